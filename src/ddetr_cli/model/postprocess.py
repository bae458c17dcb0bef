"""From logits and relative boxes to scored boxes in pixels. Source: the authors' PostProcess.

# B batch, Q queries, K classes, N kept detections
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddetr_cli.boxes import cxcywh_to_xyxy


@dataclass(frozen=True)
class Detections:
    """One image's N best (query, class) pairs, best first: scores (N,), labels (N,) class indices, boxes (N,4) px."""

    scores: Tensor
    labels: Tensor
    boxes_xyxy_px: Tensor


def postprocess(
    logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Sequence[tuple[int, int]] | Tensor, top: int = 100
) -> list[Detections]:
    """The ``min(top, Q*K)`` best pairs of each image, scaled to its size; no threshold, no suppression, no clipping.

    logits (B,Q,K), boxes_cxcywh (B,Q,4) in [0,1], sizes_hw B original (height, width). One query can appear with
    several labels.
    """
    _, Q, K = logits.shape
    scores, best = logits.sigmoid().flatten(1).topk(min(top, Q * K), dim=1)
    boxes = cxcywh_to_xyxy(boxes_cxcywh).gather(1, (best // K)[..., None].expand(-1, -1, 4))
    hw = torch.as_tensor(sizes_hw, dtype=boxes.dtype, device=boxes.device)
    boxes = boxes * hw[:, [1, 0, 1, 0]][:, None]
    return [Detections(*image) for image in zip(scores, best % K, boxes, strict=True)]
