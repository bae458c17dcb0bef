"""What the library gives back: plain, typed, frozen, without torch, and the rows of a COCO results file.

Importing this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

if TYPE_CHECKING:
    from ddetr_cli.classes import CategoryId


class Box(NamedTuple):
    """Corners in pixels of the upright picture: x to the right, y down. Only Faster R-CNN's are clipped to it."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class Detection:
    """One object: what it is called, its category in the data set, how sure the model is (0 to 1), and where."""

    label: str
    category_id: CategoryId
    score: float
    box: Box
    class_index: int  # of the model's own class table; also chooses the colour it is drawn in


@dataclass(frozen=True)
class Detections(Sequence[Detection]):
    """What was found in one picture, best first: a sequence. ``dropped`` detections were not finite numbers."""

    items: tuple[Detection, ...]
    width: int  # of the upright picture, in pixels
    height: int
    dropped: int = 0

    @overload
    def __getitem__(self, index: int) -> Detection: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Detection, ...]: ...
    def __getitem__(self, index: int | slice) -> Detection | tuple[Detection, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """The rows of a COCO results file, the very ones that ``ddetr detect`` writes for this picture."""
        return [coco_row(image_id, found.category_id, found.box, found.score) for found in self.items]


def coco_row(
    image_id: int, category_id: CategoryId, box_xyxy: tuple[float, float, float, float], score: float
) -> dict[str, Any]:
    """One detection as COCO writes it: corner and size in pixels.

    Rounded to 1/10000 px, as an upright pixel coordinate in float32 holds no more; scores to nine significant
    digits, which tell any two float32 apart.
    """
    x0, y0, x1, y1 = box_xyxy
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [round(value, 4) for value in (x0, y0, x1 - x0, y1 - y0)],
        "score": float(f"{score:.9g}") if math.isfinite(score) else score,
    }
