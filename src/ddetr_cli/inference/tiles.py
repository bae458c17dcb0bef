"""Large pictures in overlapping tiles: where the tiles lie, and how what was found in them becomes one list.

An object no larger than the overlap lies whole in some tile. So boxes that a tile's border cuts are dropped, as is
what the view of the whole picture says of objects that small; larger objects are what that view is for.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ddetr_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ddetr_cli.inference.detections import ImageDetections

SMALLEST_TILE = 32
DEFAULT_OVERLAP = 0.25
# A box that ends this close to a tile's border (fraction of the tile) is taken as cut by it.
_BORDER = 0.01
# Boxes of one class from two views that share this much (IoU) are one object.
_SAME_OBJECT = 0.5
_CELLS = 8  # of the grid in which boxes are looked for, along a tile


class View(NamedTuple):
    """The part of a picture that the model sees at once, in pixels; the last column and row are not in it."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Tiling:
    """Square tiles of ``size`` pixels; neighbours share at least ``overlap`` of it. Raises UsageError."""

    size: int
    overlap: float = DEFAULT_OVERLAP

    def __post_init__(self) -> None:
        if self.size < SMALLEST_TILE:
            raise UsageError(f"tiles of {self.size} pixels: too small. Give at least {SMALLEST_TILE}.")
        if not 0 <= self.overlap <= 0.9:
            raise UsageError(f"tile overlap {self.overlap}: out of range. Give 0 to 0.9.")

    @property
    def shared_px(self) -> int:
        """What neighbours share at least."""
        return round(self.size * self.overlap)

    def views(self, width: int, height: int) -> list[View]:
        """The whole picture, then its tiles row by row; only the whole where that fits into one tile."""
        whole = View(0, 0, width, height)
        tiles = [View(x0, y0, x1, y1) for y0, y1 in self._spans(height) for x0, x1 in self._spans(width)]
        return [whole] if tiles == [whole] else [whole, *tiles]

    def _spans(self, side: int) -> list[tuple[int, int]]:
        """Beginning and end of the tiles along a side, evenly spaced, so that all are of one size."""
        if side <= self.size:
            return [(0, side)]
        count = 1 + -(-(side - self.size) // (self.size - self.shared_px))
        starts = [index * (side - self.size) // (count - 1) for index in range(count)]
        return [(start, start + self.size) for start in starts]

    def merge(self, views: Sequence[View], found: Sequence[ImageDetections]) -> ImageDetections:
        """What was found in each of ``views``, as one list in pixels of the whole picture, best first."""
        if len(views) == 1:
            return found[0]
        shifted = [
            one.boxes_xyxy_px + torch.tensor([view.left, view.top] * 2)
            for view, one in zip(views, found, strict=True)
        ]
        kept = [self._trusted(view, boxes, views[0]) for view, boxes in zip(views, shifted, strict=True)]
        boxes = torch.cat([boxes[rows] for boxes, rows in zip(shifted, kept, strict=True)])
        scores = torch.cat([one.scores[rows] for one, rows in zip(found, kept, strict=True)])
        labels = torch.cat([one.labels[rows] for one, rows in zip(found, kept, strict=True)])
        origins = [index for index, rows in enumerate(kept) for _ in range(int(rows.sum()))]
        scores, order = scores.sort(descending=True, stable=True)
        boxes, labels = boxes[order], labels[order]
        rows = self._distinct(boxes.tolist(), labels.tolist(), [origins[index] for index in order.tolist()])
        return type(found[0])(boxes[rows], scores[rows], labels[rows], sum(one.dropped for one in found))

    def _trusted(self, view: View, boxes: Tensor, whole: View) -> Tensor:
        """Which boxes (N,4) of a view count: whole ones of a tile, large ones of the whole picture."""
        border = self.size * _BORDER
        if view == whole:
            return (boxes[:, 2:] - boxes[:, :2]).amax(dim=1) > self.shared_px - 2 * border
        is_cut = torch.zeros(len(boxes), dtype=torch.bool)
        for axis, end in enumerate((whole.right, whole.bottom)):
            if view[axis] > 0:
                is_cut |= boxes[:, axis] <= view[axis] + border
            if view[axis + 2] < end:
                is_cut |= boxes[:, axis + 2] >= view[axis + 2] - border
        return ~is_cut

    def _distinct(self, boxes: list[list[float]], labels: list[int], origins: list[int]) -> list[int]:
        """The rows left when of boxes of one object from several views the first, the best, stays."""
        # The centres of two such boxes are no further apart than half the smaller one, and one of the two is of a
        # tile. So a grid tells which to compare, and a picture may have any number of tiles.
        cell = self.size / _CELLS
        cells: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
        rows = []
        for row, (x0, y0, x1, y1) in enumerate(boxes):
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            reach_x, reach_y = (min(side, self.size) / 2 for side in (x1 - x0, y1 - y0))
            near = (
                other
                for i in range(int((x - reach_x) // cell), int((x + reach_x) // cell) + 1)
                for j in range(int((y - reach_y) // cell), int((y + reach_y) // cell) + 1)
                for other in cells.get((labels[row], i, j), ())
            )
            if not any(origins[o] != origins[row] and _iou(boxes[o], boxes[row]) >= _SAME_OBJECT for o in near):
                cells[labels[row], int(x // cell), int(y // cell)].append(row)
                rows.append(row)
        return rows


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
