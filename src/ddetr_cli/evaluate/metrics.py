"""The twelve COCO numbers of a list of detections, as pycocotools' COCOeval computes them for boxes.

At most 100 detections per image and class count, the best by score: COCO's own rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddetr_cli.data.records import CocoAnnotations, CocoCategory
from ddetr_cli.evaluate.accumulate import Curves, accumulate
from ddetr_cli.evaluate.matching import IOU_THRESHOLDS, LIMITS, SIZES, match
from ddetr_cli.evaluate.table import Detection, DetectionTable, ranks, table_of

Numbers = dict[str, float | None]
Interval = tuple[float, float]
Evaluator = Literal["fast", "pycocotools"]

# name -> (is precision, IoU threshold or None for the mean over 0.50:0.95, object size, detections per image)
DEFINITIONS: dict[str, tuple[bool, float | None, str, int]] = {
    "AP": (True, None, "all", 100),
    "AP50": (True, 0.5, "all", 100),
    "AP75": (True, 0.75, "all", 100),
    "APs": (True, None, "small", 100),
    "APm": (True, None, "medium", 100),
    "APl": (True, None, "large", 100),
    "AR1": (False, None, "all", 1),
    "AR10": (False, None, "all", 10),
    "AR100": (False, None, "all", 100),
    "ARs": (False, None, "small", 100),
    "ARm": (False, None, "medium", 100),
    "ARl": (False, None, "large", 100),
}

METRICS = tuple(DEFINITIONS)


@dataclass(frozen=True)
class CocoMetrics:
    """The twelve numbers, unrounded; None where COCOeval says -1 (nothing of that size or class in the data).

    ``intervals`` are those of ``bootstrap.intervals``, where asked for.
    """

    overall: Numbers
    images: int
    detections: int
    per_class: dict[str, Numbers] = field(default_factory=dict)
    intervals: dict[str, Interval | None] = field(default_factory=dict)

    def to_json(self, *, per_class: bool = False) -> dict[str, Any]:
        """The content of metrics.json."""
        content: dict[str, Any] = {**self.overall, "images": self.images, "detections": self.detections}
        if self.intervals:
            content["intervals"] = self.intervals
        if per_class:
            content["per_class"] = self.per_class
        return content


def evaluate_detections(
    ground_truth: CocoAnnotations,
    detections: Iterable[Detection] | DetectionTable,
    *,
    evaluator: Evaluator = "fast",
) -> CocoMetrics:
    """The numbers of ``detections`` against ``ground_truth``, over all and for every category by name.

    Both evaluators give the same bits. Detections must be of listed images and finite, else ValueError: a NaN box
    would count as a perfect match. Those of categories the file does not list are not scored, as in pycocotools.
    """
    table = table_of(ground_truth, detections)
    if evaluator == "pycocotools":
        from ddetr_cli.evaluate.reference import pycocotools_curves

        return metrics_of(ground_truth, len(table), pycocotools_curves(ground_truth, table))
    return metrics_of(ground_truth, len(table), accumulate(match(ground_truth, table)))


def metrics_of(ground_truth: CocoAnnotations, detections: int, curves: Curves) -> CocoMetrics:
    """The numbers that the curves of so many detections mean."""
    labels = unique_labels(ground_truth.categories)
    by_id = np.argsort(ranks([category.id for category in ground_truth.categories]))
    return CocoMetrics(
        overall=_numbers(curves, slice(None)),
        images=len(ground_truth.images),
        detections=detections,
        per_class={
            labels[ground_truth.categories[position].id]: _numbers(curves, [index])
            for index, position in enumerate(by_id)
        },
    )


def unique_labels(categories: Sequence[CocoCategory]) -> dict[int | str, str]:
    """Category id -> its name, with the id behind it where two categories share the name."""
    counts = Counter(category.name for category in categories)
    return {c.id: c.name if counts[c.name] == 1 else f"{c.name} (id {c.id})" for c in categories}


def _numbers(curves: Curves, classes: slice | list[int]) -> Numbers:
    """The twelve means over these classes."""
    found: Numbers = {}
    for name, (is_precision, iou, size, limit) in DEFINITIONS.items():
        area = list(SIZES).index(size)
        values: NDArray[np.float64] = (
            curves.precision[..., classes, area]
            if is_precision
            else curves.recall[:, classes, area, LIMITS.index(limit)]
        )
        if iou is not None:
            values = values[np.isclose(IOU_THRESHOLDS, iou)]
        present = values[values > -1]
        found[name] = float(present.mean()) if present.size else None
    return found
