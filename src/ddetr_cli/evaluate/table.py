"""Many detections in five columns of numbers, 48 bytes each instead of half a kilobyte as Python objects."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddetr_cli.classes import CategoryId
from ddetr_cli.data.records import CocoAnnotations, ImageId
from ddetr_cli.inference.suppression import rows_without_overlaps

_CHUNK = 4096  # rows turned into Python objects at a time


@dataclass(frozen=True, slots=True)
class Detection:
    """One detected box in pixels of its image; the ids are those of the ground truth, unchanged."""

    image_id: ImageId
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


@dataclass(frozen=True)
class DetectionTable:
    """N detections: ``image`` and ``category`` (N,) are positions in ``image_ids`` and ``category_ids``.

    ``boxes_xywh`` (N,4) and ``scores`` (N,) are float64, as JSON has them. Both tuples start with the ids of the
    ground truth, in its order; categories it does not list follow, and are not scored.
    """

    image_ids: tuple[ImageId, ...]
    category_ids: tuple[CategoryId, ...]
    image: NDArray[np.int32]
    category: NDArray[np.int32]
    boxes_xywh: NDArray[np.float64]
    scores: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        for start in range(0, len(self), _CHUNK):
            part = slice(start, start + _CHUNK)
            columns = (self.image[part], self.category[part], self.boxes_xywh[part], self.scores[part])
            for image, category, box, score in zip(*(column.tolist() for column in columns), strict=True):
                yield Detection(self.image_ids[image], self.category_ids[category], tuple(box), score)

    def rows(self, chosen: NDArray[Any]) -> DetectionTable:
        """Only these rows: positions, or True and False for each."""
        return replace(
            self,
            image=self.image[chosen],
            category=self.category[chosen],
            boxes_xywh=self.boxes_xywh[chosen],
            scores=self.scores[chosen],
        )

    def without_overlaps(self, iou: float) -> DetectionTable:
        """Without those that overlap a better one of their image and category by more than this; order unchanged."""
        order = np.lexsort((-self.scores, self.image))
        ends = np.searchsorted(self.image[order], np.arange(1, len(self.image_ids)))
        stays = np.zeros(len(self), dtype=bool)
        for rows in np.split(order, ends):
            corners = self.boxes_xywh[rows]
            corners[:, 2:] += corners[:, :2]
            stays[rows[rows_without_overlaps(corners, self.category[rows], iou)]] = True
        return self.rows(stays)

    def of(self, ground_truth: CocoAnnotations) -> DetectionTable:
        """The same as a table of ``ground_truth``: only the detections in its images, with positions in its lists."""
        image_ids = tuple(image.id for image in ground_truth.images)
        category_ids = _places(category.id for category in ground_truth.categories)
        image_at = _places(image_ids)
        image = np.array([image_at.get(image_id, -1) for image_id in self.image_ids], dtype=np.int32)[self.image]
        category = np.array(
            [category_ids.setdefault(category_id, len(category_ids)) for category_id in self.category_ids], np.int32
        )[self.category]
        moved = replace(self, image_ids=image_ids, category_ids=tuple(category_ids), image=image, category=category)
        return moved if (image >= 0).all() else moved.rows(image >= 0)

    def is_of(self, ground_truth: CocoAnnotations) -> bool:
        """Whether the positions are those in the lists of ``ground_truth``."""
        listed = tuple(category.id for category in ground_truth.categories)
        return (
            self.image_ids == tuple(image.id for image in ground_truth.images)
            and self.category_ids[: len(listed)] == listed
        )

    def to_json_lines(self) -> Iterator[bytes]:
        """A COCO results file in pieces, one detection a line, unrounded."""
        start = "[\n"
        for detection in self:
            yield (start + json.dumps(detection.to_json(), allow_nan=False)).encode()
            start = ",\n"
        yield b"\n]\n" if len(self) else b"[]\n"


class TableBuilder:
    """Collects detections in the images of ``ground_truth``, row by row."""

    def __init__(self, ground_truth: CocoAnnotations) -> None:
        self._images = _places(image.id for image in ground_truth.images)
        self._categories = _places(category.id for category in ground_truth.categories)
        self._image, self._category = array("i"), array("i")
        self._boxes, self._scores = array("d"), array("d")

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, image_id: ImageId, category_id: CategoryId, bbox_xywh: Sequence[float], score: float) -> None:
        """One more row. Raises KeyError for an image the ground truth does not list."""
        self._image.append(self._images[image_id])
        category = self._categories.get(category_id)
        if category is None:
            category = self._categories[category_id] = len(self._categories)
        self._category.append(category)
        self._boxes.extend(bbox_xywh)
        self._scores.append(score)

    def extend(self, detections: Iterable[Detection]) -> None:
        """``add`` for each."""
        for detection in detections:
            self.add(detection.image_id, detection.category_id, detection.bbox_xywh, detection.score)

    def build(self) -> DetectionTable:
        """The table; it shares its memory with the builder, which must not be added to any more."""
        return DetectionTable(
            tuple(self._images),
            tuple(self._categories),
            np.frombuffer(self._image, dtype=np.int32),
            np.frombuffer(self._category, dtype=np.int32),
            np.frombuffer(self._boxes, dtype=np.float64).reshape(-1, 4),
            np.frombuffer(self._scores, dtype=np.float64),
        )


def table_of(ground_truth: CocoAnnotations, detections: Iterable[Detection] | DetectionTable) -> DetectionTable:
    """``detections`` as a table of ``ground_truth``; one that is that already, unchanged.

    Raises ValueError where one is not finite, KeyError where one is of an image that is not listed.
    """
    if isinstance(detections, DetectionTable):
        table = detections if detections.is_of(ground_truth) else detections.of(ground_truth)
    else:
        builder = TableBuilder(ground_truth)
        builder.extend(detections)
        table = builder.build()
    if not (np.isfinite(table.boxes_xywh).all() and np.isfinite(table.scores).all()):
        raise ValueError("a detection is not finite")
    return table


def merged(ground_truth: CocoAnnotations, parts: Sequence[DetectionTable]) -> DetectionTable:
    """The tables of parts of the images as one of ``ground_truth``, image by image in its order."""
    categories = _places(category.id for category in ground_truth.categories)
    moved = [part.of(ground_truth) for part in parts]
    category = np.concatenate(
        [
            np.array([categories.setdefault(value, len(categories)) for value in part.category_ids], np.int32)[
                part.category
            ]
            for part in moved
        ]
    )
    image = np.concatenate([part.image for part in moved])
    whole = DetectionTable(
        tuple(image.id for image in ground_truth.images),
        tuple(categories),
        image,
        category,
        np.concatenate([part.boxes_xywh for part in moved]),
        np.concatenate([part.scores for part in moved]),
    )
    return whole.rows(np.argsort(image, kind="stable"))


def _places(ids: Iterable[ImageId]) -> dict[ImageId, int]:
    return {value: index for index, value in enumerate(ids)}


def ranks(ids: Sequence[ImageId]) -> NDArray[np.int64]:
    """For each id its place among all when sorted, numbers by value and then strings: pycocotools' order."""
    order = sorted(range(len(ids)), key=lambda index: _sort_key(ids[index]))
    places = np.empty(len(ids), dtype=np.int64)
    places[order] = np.arange(len(ids))
    return places


def _sort_key(value: ImageId) -> tuple[bool, int, str]:
    return isinstance(value, str), 0 if isinstance(value, str) else value, str(value)
