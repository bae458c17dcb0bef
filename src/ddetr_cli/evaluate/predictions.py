"""Results files: COCO's list of detections, read and checked before any of it is scored.

The checks matter: pycocotools counts a detection of four NaNs as a perfect match, and crashes on an empty list.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddetr_cli.classes import COCO_TABLE
from ddetr_cli.data.coco import CocoAnnotations
from ddetr_cli.data.jsonfile import box, number, plain_id, read_json, short, some
from ddetr_cli.errors import DatasetError
from ddetr_cli.evaluate.table import DetectionTable, TableBuilder


def read_predictions(paths: Sequence[Path], ground_truth: CocoAnnotations) -> DetectionTable:
    """The detections of one results file or of several, the parts of one result, in their order.

    Each must be of an image and a category that ``ground_truth`` knows, and no image in two of the files. Raises
    DatasetError for anything but lists of {image_id, category_id, bbox, score} with finite numbers. An empty list
    is a valid result, of AP 0.
    """
    builder = TableBuilder(ground_truth)
    starts = []
    for path in paths:
        starts.append(len(builder))
        _Reader(path, ground_truth, builder).read()
    table = builder.build()
    seen: dict[int, Path] = {}
    for path, start, end in zip(paths, starts, [*starts[1:], len(table)], strict=True):
        for image in np.unique(table.image[start:end]).tolist():
            if image in seen:
                raise DatasetError(
                    f"{path}: has detections of image {table.image_ids[image]!r}, as {seen[image]} has. "
                    "Give the parts of one result, each image in one of them."
                )
            seen[image] = path
    return table


class _Reader:
    """Reads one file, turning each detection into a row as soon as it is parsed: no room for all as objects."""

    def __init__(self, path: Path, ground_truth: CocoAnnotations, builder: TableBuilder) -> None:
        self.path, self.ground_truth, self.builder = path, ground_truth, builder
        self._categories = {category.id for category in ground_truth.categories}
        if ground_truth.class_table() is COCO_TABLE:
            # COCO models predict ids without a name (12, 26, ...): not scored, but no sign of another data set.
            self._categories |= set(COCO_TABLE.category_ids)
        self._unknown: dict[str, Counter[Any]] = {"image": Counter(), "category": Counter()}
        self._taken = 0

    def read(self) -> None:
        """Add the file's detections to the builder."""
        document = read_json(self.path, replace=self._take)
        if not isinstance(document, list):
            hint = "Give its list of detections alone." if isinstance(document, dict) else "Give a COCO results file."
            raise DatasetError(f"{self.path}: the top level is not a list of detections. {hint}")
        for index, entry in enumerate(document):
            if entry is not _TAKEN:
                self._refuse(index, entry)
        if self._taken != len(document):
            raise DatasetError(
                f"{self.path}: detections inside of detections ({self._taken} in {len(document)} entries). "
                "Give a COCO results file."
            )
        for what, unknown in self._unknown.items():
            if unknown:
                raise DatasetError(
                    f"{self.path}: {unknown.total()} of {self._taken} detections have {what} ids that "
                    f"{self.ground_truth.path} does not list ({some([repr(value) for value in unknown])}). "
                    "Give the results of this data set."
                )

    def _take(self, entry: dict[str, Any]) -> Any:
        """Called with every object of the file: a detection goes into the table, any other stays."""
        if "image_id" not in entry or "bbox" not in entry:
            return entry
        # The first look at each type is for speed: half a million are nearly always as they should be.
        image_id, category_id, score = entry["image_id"], entry.get("category_id"), entry.get("score")
        if type(image_id) is not int:
            image_id = plain_id(image_id)
        if type(category_id) is not int:
            category_id = plain_id(category_id)
        if type(score) is not float or not math.isfinite(score):
            score = number(score)
        bbox_xywh = box(entry["bbox"])
        if image_id is None or category_id is None or score is None or bbox_xywh is None:
            raise self._fault(entry)
        _, _, w, h = bbox_xywh
        # In pycocotools such an area can make the union 0 or infinite and the IoU NaN: a perfect match.
        if w < 0 or h < 0 or w * h == math.inf:
            raise self._fault(entry)
        self._taken += 1
        if category_id not in self._categories:
            self._unknown["category"][category_id] += 1
            return _TAKEN
        try:
            self.builder.add(image_id, category_id, bbox_xywh, score)
        except KeyError:
            self._unknown["image"][image_id] += 1
        return _TAKEN

    def _fault(self, entry: dict[str, Any]) -> DatasetError:
        """What is wrong with the detection that comes next."""
        where = f"{self.path}: detection {self._taken}"
        for key in ("category_id", "score"):
            if key not in entry:
                return DatasetError(f"{where} has no {key!r}. Give a COCO results file with boxes.")
        if plain_id(entry["image_id"]) is None or plain_id(entry["category_id"]) is None:
            return DatasetError(
                f"{where} has an image_id or category_id that is neither integer nor string. Correct it."
            )
        bbox = short(entry["bbox"])
        bbox_xywh = box(entry["bbox"])
        if bbox_xywh is None:
            return DatasetError(f"{where} has bbox {bbox}, not four finite numbers. Do not score it.")
        if number(entry["score"]) is None:
            return DatasetError(f"{where} has score {short(entry['score'])}, not a finite number. Do not score it.")
        if min(bbox_xywh[2:]) < 0:
            return DatasetError(f"{where} has bbox {bbox}, of negative size. Write [x, y, width, height].")
        return DatasetError(f"{where} has bbox {bbox}, of infinite area. Do not score it.")

    def _refuse(self, index: int, entry: Any) -> None:
        where = f"{self.path}: detection {index}"
        if not isinstance(entry, dict):
            raise DatasetError(f"{where} is not an object. Give a COCO results file.")
        key = "image_id" if "image_id" not in entry else "bbox"
        raise DatasetError(f"{where} has no {key!r}. Give a COCO results file with boxes.")


_TAKEN = object()
