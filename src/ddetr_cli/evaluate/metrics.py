"""The twelve COCO numbers of a list of detections, as pycocotools' COCOeval computes them for boxes.

pycocotools gets its data in memory and with clean ids (1..n, in the order of the original ids, so that equal
scores are ranked as it would rank them); its prints are swallowed. At most 100 detections per image and class
count, the best by score: COCO's own rule.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ddetr_cli.data.coco import CocoAnnotations, CocoCategory
from ddetr_cli.evaluate.predictions import Detection

Numbers = dict[str, float | None]

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
    """The twelve numbers, unrounded; None where COCOeval says -1 (nothing of that size or class in the data)."""

    overall: Numbers
    images: int
    detections: int
    per_class: dict[str, Numbers] = field(default_factory=dict)

    def to_json(self, *, per_class: bool = False) -> dict[str, Any]:
        """The content of metrics.json."""
        content: dict[str, Any] = {**self.overall, "images": self.images, "detections": self.detections}
        if per_class:
            content["per_class"] = self.per_class
        return content


def evaluate_detections(ground_truth: CocoAnnotations, detections: Sequence[Detection]) -> CocoMetrics:
    """The numbers of ``detections`` against ``ground_truth``, over all and for every category by name.

    Detections must be of listed images and finite, else ValueError: a NaN box would count as a perfect match. Those
    of categories the file does not list are not scored, as in pycocotools.
    """
    if not all(math.isfinite(value) for d in detections for value in (*d.bbox_xywh, d.score)):
        raise ValueError("a detection is not finite")
    image_ranks = _ranks([image.id for image in ground_truth.images])
    category_ranks = _ranks([category.id for category in ground_truth.categories])
    images = [{"id": rank} for rank in image_ranks.values()]
    categories = [{"id": rank} for rank in category_ranks.values()]
    truth = [
        {
            "id": index + 1,
            "image_id": image_ranks[annotation.image_id],
            "category_id": category_ranks[annotation.category_id],
            "bbox": list(annotation.bbox_xywh),
            "area": annotation.area,
            "iscrowd": int(annotation.iscrowd),
        }
        for index, annotation in enumerate(ground_truth.annotations)
    ]
    scored = [detection for detection in detections if detection.category_id in category_ranks]
    results = [
        {
            "id": index + 1,
            "image_id": image_ranks[detection.image_id],
            "category_id": category_ranks[detection.category_id],
            "bbox": list(detection.bbox_xywh),
            "area": detection.bbox_xywh[2] * detection.bbox_xywh[3],
            "iscrowd": 0,
            "score": detection.score,
        }
        for index, detection in enumerate(scored)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(images, categories, truth), _coco(images, categories, results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    by_rank = {category_ranks[category.id]: category for category in ground_truth.categories}
    labels = _unique_labels(ground_truth.categories)
    return CocoMetrics(
        overall=_numbers(evaluation, slice(None)),
        images=len(images),
        detections=len(detections),
        per_class={
            labels[by_rank[rank].id]: _numbers(evaluation, [index])
            for index, rank in enumerate(evaluation.params.catIds)
        },
    )


def _coco(images: list[dict[str, Any]], categories: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco


def _ranks(ids: Sequence[int | str]) -> dict[int | str, int]:
    """Original id -> 1-based rank: numbers by value, then strings."""
    ordered = sorted(ids, key=lambda i: (isinstance(i, str), 0 if isinstance(i, str) else i, str(i)))
    return {original: rank + 1 for rank, original in enumerate(ordered)}


def _unique_labels(categories: Sequence[CocoCategory]) -> dict[int | str, str]:
    """Category id -> its name, with the id behind it where two categories share the name."""
    counts = Counter(category.name for category in categories)
    return {c.id: c.name if counts[c.name] == 1 else f"{c.name} (id {c.id})" for c in categories}


def _numbers(evaluation: Any, classes: slice | list[int]) -> Numbers:
    """The twelve means over these classes, from the arrays that ``accumulate`` left."""
    parameters = evaluation.params
    found: Numbers = {}
    for name, (is_precision, iou, size, limit) in DEFINITIONS.items():
        # precision is (IoU, recall, class, size, limit), recall (IoU, class, size, limit)
        values: NDArray[np.float64] = evaluation.eval["precision" if is_precision else "recall"]
        values = values[..., classes, parameters.areaRngLbl.index(size), parameters.maxDets.index(limit)]
        if iou is not None:
            values = values[np.isclose(parameters.iouThrs, iou)]
        present = values[values > -1]
        found[name] = float(present.mean()) if present.size else None
    return found
