"""Which boxes stay where a model finds one object twice: suppression of overlaps, within each class.

Importing this module does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ddetr_cli.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_BLOCK = 256  # rows compared with all that follow at a time: tiles may give ten thousand boxes


def check_nms(iou: float | None) -> None:
    """Raise UsageError for an overlap that cannot be a limit."""
    if iou is not None and not 0 < iou < 1:
        raise UsageError(f"--nms {iou:g}: not between 0 and 1. Give the overlap (IoU) to leave boxes out at, as 0.7.")


def rows_without_overlaps(boxes_xyxy: ArrayLike, labels: ArrayLike, iou: float) -> NDArray[np.int64]:
    """The rows of boxes (N,4), best first, that overlap no better one that stays, of their label, by more than this.

    Labels (N,). Bit for bit ``torchvision.ops.batched_nms`` class by class, for rows in the order of their scores.
    """
    boxes, classes = np.asarray(boxes_xyxy), np.asarray(labels)
    stays = np.ones(len(boxes), dtype=bool)
    for start in range(0, len(boxes), _BLOCK):
        block = slice(start, start + _BLOCK)
        is_same = classes[block, None] == classes[None, start:]
        # In float64, as torchvision compares: in float32 the limit itself would be rounded.
        overlaps = is_same & (_iou(boxes[block], boxes[start:]).astype(np.float64) > iou)
        for row, others in enumerate(overlaps):
            if stays[start + row]:
                stays[start + row + 1 :] &= ~others[row + 1 :]
    return np.flatnonzero(stays)


def _iou(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """IoU (N,M) of boxes (N,4) and (M,4); NaN for two that are empty."""
    size = (np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])).clip(min=0)
    shared = size[..., 0] * size[..., 1]
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: NDArray[Any] = shared / (areas[0][:, None] + areas[1][None, :] - shared)
    return ratio
