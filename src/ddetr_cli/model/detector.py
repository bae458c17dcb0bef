"""What every detector is and gives, and Deformable DETR: trunk, projections, transformer, heads. Read this first.

# B batch, Q queries, K classes, C channels, S positions over all levels, H, W image height and width, L levels
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr_cli.model.backbone import BACKBONES, ResNet
from ddetr_cli.model.position import sine_position
from ddetr_cli.model.transformer import DeformableTransformer, refine_boxes
from ddetr_cli.presets import ModelConfig

FOCAL_PRIOR = 0.01  # every class starts at this probability (arXiv:1708.02002, section 3.3)


@dataclass
class DetectorOutput:
    """Predictions of one batch.

    logits (B,Q,K), DETR's (B,Q,K+1) with "no object" last, and boxes_cxcywh (B,Q,4) in [0,1] of the last decoder
    layer. ``aux`` holds the same pairs of the earlier layers and is filled in training mode only. ``proposals`` is
    the first stage's pair over all S positions, in two-stage models.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    aux: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    proposals: tuple[Tensor, Tensor] | None = None


class DetectionModel(nn.Module):
    """What every system is here: a module that knows its configuration and has its trunk in ``backbone``.

    It is called with normalised pixels (B,3,H,W) and padding (B,H,W), True = padding, or None for none;
    ``postprocess.decode`` turns what it returns into detections.
    """

    config: ModelConfig
    backbone: nn.Module


class BoxHead(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(channels, channels), nn.Linear(channels, channels), nn.Linear(channels, 4)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 4), boxes before the sigmoid."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]


def _class_head(channels: int, classes: int) -> nn.Linear:
    head = nn.Linear(channels, classes)
    nn.init.constant_(head.bias, -math.log((1 - FOCAL_PRIOR) / FOCAL_PRIOR))
    return head


def _box_head(channels: int) -> BoxHead:
    """A head whose last layer starts at zero, so that boxes start at their references."""
    head = BoxHead(channels)
    for parameter in head.layers[-1].parameters():
        nn.init.zeros_(parameter)
    return head


class DeformableDetr(DetectionModel):
    """Deformable DETR of one configuration, initialised as the authors do. Source: arXiv:2010.04159."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        C = config.hidden_dim
        self.backbone: ResNet = ResNet(BACKBONES[config.backbone], dilation=config.dilation)
        self.input_proj = nn.ModuleList()
        for level in range(config.levels):
            if config.levels == 1:
                conv = nn.Conv2d(self.backbone.channels[-1], C, 1)
            elif level < 3:
                conv = nn.Conv2d(self.backbone.channels[level], C, 1)
            else:
                conv = nn.Conv2d(self.backbone.channels[-1] if level == 3 else C, C, 3, 2, 1)
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.get_parameter("bias"))
            self.input_proj.append(nn.Sequential(conv, nn.GroupNorm(32, C)))
        self.transformer = DeformableTransformer(config)
        if not config.two_stage:
            self.query_embed = nn.Embedding(config.queries, 2 * C)
        # Without refinement all layers share one head; with it each has its own, and proposals one more.
        heads = (config.decoder_layers + config.two_stage) if config.refine_boxes else 1
        # They start as copies of each other: the authors clone one.
        class_head, box_head = _class_head(C, config.classes), _box_head(C)
        self.class_embed = nn.ModuleList([copy.deepcopy(class_head) for _ in range(heads)])
        self.bbox_embed = nn.ModuleList([copy.deepcopy(box_head) for _ in range(heads)])
        if not config.two_stage:
            # Boxes start small (sigmoid(-2) = 0.12 of the image); later layers refine from there.
            with torch.no_grad():
                self.bbox_embed[0].get_parameter("layers.2.bias")[2:] = -2.0

    def forward(self, pixels: Tensor, is_padding: Tensor | None = None) -> DetectorOutput:
        """Predict for normalised pixels (B,3,H,W) with padding (B,H,W), True = padding, or None for none."""
        maps = self._feature_maps(pixels)
        full = pixels.new_zeros(pixels.shape[0], 1, *pixels.shape[-2:]) if is_padding is None else is_padding[:, None]
        paddings = [F.interpolate(full.float(), size=m.shape[-2:], mode="nearest")[:, 0].bool() for m in maps]
        dtype = torch.float64 if pixels.dtype == torch.float64 else torch.float32
        positions = [sine_position(p, self.config.hidden_dim, dtype=dtype) for p in paddings]
        queries = None if self.config.two_stage else self.query_embed.weight
        decoded = self.transformer(
            maps,
            paddings,
            positions,
            queries,
            list(self.class_embed),
            list(self.bbox_embed),
            is_padded=is_padding is not None,
        )

        def predict(layer: int) -> tuple[Tensor, Tensor]:
            head = layer if self.config.refine_boxes else 0
            hidden = decoded.hidden[layer]
            if self.config.refine_boxes:
                boxes = decoded.boxes[layer]
            else:
                boxes = refine_boxes(self.bbox_embed[0](hidden), decoded.references[layer])
            return self.class_embed[head](hidden), boxes

        last = self.config.decoder_layers - 1
        logits, boxes = predict(last)
        out = DetectorOutput(logits, boxes)
        if self.training:
            out.aux = [predict(layer) for layer in range(last)]
        if decoded.proposals is not None:
            out.proposals = (decoded.proposals.logits, decoded.proposals.boxes_unactivated.sigmoid())
        return out

    def _feature_maps(self, pixels: Tensor) -> list[Tensor]:
        """L projected maps (B,C,h,w) of pixels (B,3,H,W)."""
        trunk = self.backbone(pixels)
        if self.config.levels == 1:
            trunk = trunk[-1:]
        maps = [proj(m) for proj, m in zip(self.input_proj, trunk, strict=False)]
        for level in range(len(trunk), self.config.levels):
            # The first extra level reads the trunk's raw last map, later ones the previous projected map.
            maps.append(self.input_proj[level](trunk[-1] if level == len(trunk) else maps[-1]))
        return maps
