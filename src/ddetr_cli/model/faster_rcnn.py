"""Faster R-CNN with a ResNet-50 feature pyramid: torchvision's implementation, called as the other systems are.

# B batch, N detections of one image, H, W network size
It is here to be compared with, for detect, eval and bench. Nothing else in this package imports torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.misc import FrozenBatchNorm2d

from ddetr_cli.model.detector import DetectionModel
from ddetr_cli.presets import ModelConfig

# What the pyramid's sides must be multiples of; torchvision pads to it after resizing.
PYRAMID_STRIDE = 32

# Pixels; one for each map of the pyramid, in three shapes.
ANCHOR_SIDES = ((32,), (64,), (128,), (256,), (512,))
ANCHOR_RATIOS = ((0.5, 1.0, 2.0),) * len(ANCHOR_SIDES)


@dataclass
class SuppressedOutput:
    """Detections of each image, duplicates already suppressed, best first.

    Lists of B: scores (N,), labels (N,) class indices, boxes_xyxy (N,4) in [0,1] of the picture, clipped to it.
    """

    scores: list[Tensor]
    labels: list[Tensor]
    boxes_xyxy: list[Tensor]


class FasterRcnn(DetectionModel):
    """torchvision's Faster R-CNN R50-FPN, with its tensor names and its defaults; class 0 is the background.

    Defaults: at most ``config.queries`` detections with a score above 0.05, suppressed per class at IoU 0.5.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        trunk = resnet_fpn_backbone(backbone_name=config.backbone, weights=None)
        # Anchors are numbers that no file holds: a model built on the meta device needs them all the same.
        with torch.device("cpu"):
            anchors = AnchorGenerator(ANCHOR_SIDES, ANCHOR_RATIOS)
        parts = FasterRCNN(
            trunk,
            num_classes=config.classes,
            rpn_anchor_generator=anchors,
            box_detections_per_img=config.queries,
        )
        self.backbone, self.rpn, self.roi_heads = parts.backbone, parts.rpn, parts.roi_heads
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0  # how its released weights were trained

    def forward(self, pixels: Tensor, is_padding: Tensor | None = None) -> SuppressedOutput:
        """Detect in normalised pixels (B,3,H,W) with padding (B,H,W) at the bottom and right, or None for none."""
        H, W = pixels.shape[-2:]
        if is_padding is None:
            sizes_hw = [(H, W)] * pixels.shape[0]
        else:
            valid = ~is_padding
            heights, widths = valid[:, :, 0].sum(1).tolist(), valid[:, 0].sum(1).tolist()
            sizes_hw = list(zip(heights, widths, strict=True))
        padded = F.pad(pixels, (0, -W % PYRAMID_STRIDE, 0, -H % PYRAMID_STRIDE))
        maps = self.backbone(padded)
        proposals, _ = self.rpn(ImageList(padded, sizes_hw), maps)
        found, _ = self.roi_heads(maps, proposals, sizes_hw)
        boxes = [
            image["boxes"] / image["boxes"].new_tensor([w, h, w, h])
            for image, (h, w) in zip(found, sizes_hw, strict=True)
        ]
        return SuppressedOutput([image["scores"] for image in found], [image["labels"] for image in found], boxes)
