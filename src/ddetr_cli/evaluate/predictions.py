"""Results files: COCO's list of detections, read and checked before any of it is scored.

The checks matter: pycocotools counts a detection of four NaNs as a perfect match, and crashes on an empty list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddetr_cli.classes import COCO_TABLE, CategoryId
from ddetr_cli.data.coco import CocoAnnotations
from ddetr_cli.data.jsonfile import box, number, plain_id, read_json, short, some
from ddetr_cli.errors import DatasetError


@dataclass(frozen=True, slots=True)
class Detection:
    """One detected box in pixels of its image; the ids are those of the ground truth, unchanged."""

    image_id: int | str
    category_id: CategoryId
    bbox_xywh: tuple[float, float, float, float]
    score: float

    def to_json(self) -> dict[str, Any]:
        """One row of a COCO results file, unrounded."""
        return {
            "image_id": self.image_id,
            "category_id": self.category_id,
            "bbox": list(self.bbox_xywh),
            "score": self.score,
        }


def read_predictions(path: Path, ground_truth: CocoAnnotations) -> list[Detection]:
    """The detections of a results file, each of an image and a category that ``ground_truth`` knows.

    Raises DatasetError for anything but a list of {image_id, category_id, bbox, score} with finite numbers. An
    empty list is a valid result, of AP 0.
    """
    document = read_json(path)
    if not isinstance(document, list):
        hint = "Give its list of detections alone." if isinstance(document, dict) else "Give a COCO results file."
        raise DatasetError(f"{path}: the top level is not a list of detections. {hint}")
    image_ids = {image.id for image in ground_truth.images}
    category_ids = {category.id for category in ground_truth.categories}
    if ground_truth.class_table() is COCO_TABLE:
        # COCO models predict ids without a name (12, 26, ...); nothing scores them, and they are no other data set.
        category_ids |= set(COCO_TABLE.category_ids)
    detections: list[Detection] = []
    unknown_images: list[Any] = []
    unknown_categories: list[Any] = []
    for index, entry in enumerate(document):
        detection = _detection(path, index, entry)
        if detection.image_id not in image_ids:
            unknown_images.append(detection.image_id)
        if detection.category_id not in category_ids:
            unknown_categories.append(detection.category_id)
        detections.append(detection)
    for what, unknown in (("image", unknown_images), ("category", unknown_categories)):
        if unknown:
            distinct = some([repr(value) for value in dict.fromkeys(unknown)])
            raise DatasetError(
                f"{path}: {len(unknown)} of {len(document)} detections have {what} ids that {ground_truth.path} does "
                f"not list ({distinct}). Give the results of this data set."
            )
    return detections


def _detection(path: Path, index: int, entry: Any) -> Detection:
    where = f"{path}: detection {index}"
    if not isinstance(entry, dict):
        raise DatasetError(f"{where} is not an object. Give a COCO results file.")
    for key in ("image_id", "category_id", "bbox", "score"):
        if key not in entry:
            raise DatasetError(f"{where} has no {key!r}. Give a COCO results file with boxes.")
    image_id, category_id = plain_id(entry["image_id"]), plain_id(entry["category_id"])
    if image_id is None or category_id is None:
        raise DatasetError(f"{where} has an image_id or category_id that is neither integer nor string. Correct it.")
    bbox_xywh = box(entry["bbox"])
    if bbox_xywh is None:
        raise DatasetError(f"{where} has bbox {short(entry['bbox'])}, not four finite numbers. Do not score it.")
    score = number(entry["score"])
    if score is None:
        raise DatasetError(f"{where} has score {short(entry['score'])}, not a finite number. Do not score it.")
    if min(bbox_xywh[2:]) < 0:  # in pycocotools its area can make the union 0 and the IoU NaN: a perfect match
        raise DatasetError(f"{where} has bbox {short(entry['bbox'])}, of negative size. Write [x, y, width, height].")
    return Detection(image_id, category_id, bbox_xywh, score)
