"""Which of a picture's detections are results: by score, by class, by number. Light: imports no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ddetr_cli.errors import UsageError

if TYPE_CHECKING:
    from ddetr_cli.classes import ClassTable
    from ddetr_cli.inference.detections import ImageDetections

_SHOWN_NAMES = 10


@dataclass(frozen=True)
class Selection:
    """Detections scoring ``threshold`` or more, or what ``thresholds`` says for their class index.

    ``one_class_per_box``: of the rows of one box, which differ in their class, only the best is looked at.
    ``classes``: only these indices. ``nms``: of two boxes of one class that overlap by more than this IoU, only the
    better. ``top``: at most so many of a picture, the best.
    """

    threshold: float = 0.5
    thresholds: Mapping[int, float] = field(default_factory=dict)
    classes: frozenset[int] | None = None
    top: int | None = None
    one_class_per_box: bool = False
    nms: float | None = None

    def __call__(self, found: ImageDetections) -> ImageDetections:
        """Those of ``found``, best first, that are kept."""
        limits = found.scores.new_tensor(
            [self.thresholds.get(label, self.threshold) for label in found.labels.tolist()]
        )
        kept = (found.scores >= limits).tolist()
        if self.one_class_per_box:
            # The class heads of a query share its box, to the last bit; two queries never do.
            seen: set[tuple[float, ...]] = set()
            for index, box in enumerate(map(tuple, found.boxes_xyxy_px.tolist())):
                kept[index] &= box not in seen
                seen.add(box)
        if self.classes is not None:
            kept = [
                is_kept and label in self.classes for is_kept, label in zip(kept, found.labels.tolist(), strict=True)
            ]
        rows = [index for index, is_kept in enumerate(kept) if is_kept]
        if self.nms is not None:
            from ddetr_cli.inference.suppression import rows_without_overlaps

            # A class's limits leave out its worst boxes, which put no better one out: before or after is the same.
            left = rows_without_overlaps(found.boxes_xyxy_px[rows], found.labels[rows], self.nms)
            rows = [rows[index] for index in left]
        rows = rows[: self.top]
        return replace(
            found, boxes_xyxy_px=found.boxes_xyxy_px[rows], scores=found.scores[rows], labels=found.labels[rows]
        )

    def to_json(self, classes: ClassTable) -> dict[str, Any]:
        """What was chosen, by category id."""
        ids = classes.category_ids
        return {
            "threshold": self.threshold,
            "thresholds": [[ids[label], value] for label, value in sorted(self.thresholds.items())],
            "classes": None if self.classes is None else [ids[label] for label in sorted(self.classes)],
            "top_k": self.top,
            "one_class_per_box": self.one_class_per_box,
            "nms": self.nms,
        }


def parse_thresholds(values: Sequence[str], default: float) -> tuple[float, dict[str, float]]:
    """The threshold of all classes, and those of some by name, from ``0.5`` and ``person=0.7``; the last ones count.

    Raises UsageError for what is no score.
    """
    everywhere, by_class = default, {}
    for value in values:
        name, equals, number = value.rpartition("=")
        try:
            score = float(number)
        except ValueError:
            score = math.nan
        if not 0 <= score <= 1 or (equals and not name):
            raise UsageError(f"--threshold {value!r}: not in the range 0 to 1. Give a score, or CLASS=SCORE.")
        if equals:
            by_class[name] = score
        else:
            everywhere = score
    return everywhere, by_class


def make_selection(
    classes: ClassTable,
    threshold: float,
    thresholds: Mapping[str, float],
    wanted: Sequence[str] | None,
    *,
    top: int | None,
    one_class_per_box: bool,
    nms: float | None = None,
) -> Selection:
    """The selection of a command line: classes by name or category id. Raises UsageError for unknown ones."""
    limits = {
        label: score for text, score in thresholds.items() for label in _labels_of(text, classes, "--threshold")
    }
    chosen = (
        None
        if wanted is None
        else frozenset(label for text in wanted for label in _labels_of(text, classes, "--classes"))
    )
    return Selection(threshold, limits, chosen, top, one_class_per_box, nms)


def _labels_of(text: str, classes: ClassTable, option: str) -> list[int]:
    """The class indices that ``text`` means: a name, a name in other capitals, or a category id."""
    names = [classes.name(label) for label in range(len(classes))]
    for key, fold in ((names, str), (names, str.casefold), (list(map(str, classes.category_ids)), str)):
        found = [label for label, name in enumerate(key) if fold(name) == fold(text)]
        if found:
            return found
    known = [name for name in classes.names if name is not None]
    folded = {name.casefold(): name for name in known}
    close = [folded[name] for name in difflib.get_close_matches(text.casefold(), folded, n=3)]
    if close:
        hint = f"Did you mean {' or '.join(close)}?"
    else:
        more = ", ..." if len(known) > _SHOWN_NAMES else ""
        hint = f"It has {', '.join(known[:_SHOWN_NAMES])}{more}."
    raise UsageError(f"{option} {text!r}: unknown (the model has no such class). {hint}")
