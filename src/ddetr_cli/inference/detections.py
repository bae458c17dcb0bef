"""What a predictor finds in one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, best first, no threshold.

    boxes_xyxy_px (N,4), scores (N,), labels (N,) class indices: CPU tensors; boxes in pixels of the image as given,
    not clipped to it (Faster R-CNN's are). ``dropped`` rows were not finite and are not among the N.
    """

    boxes_xyxy_px: Tensor
    scores: Tensor
    labels: Tensor
    dropped: int = 0


def finite(boxes_xyxy_px: Tensor, scores: Tensor, labels: Tensor) -> ImageDetections:
    """The rows whose score and four coordinates are finite: a NaN would count as a perfect match in pycocotools."""
    is_finite = scores.isfinite() & boxes_xyxy_px.isfinite().all(dim=1)
    dropped = len(scores) - int(is_finite.sum())
    return ImageDetections(boxes_xyxy_px[is_finite], scores[is_finite], labels[is_finite], dropped)
