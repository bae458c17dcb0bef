"""COCO annotation files: read, validated and, where that is safe, repaired in memory before anything uses them.

pycocotools accepts much that silently changes a result: an annotation id 0 lowers AP, a string ``iscrowd`` makes
every box a crowd, a missing ``area`` is a bare KeyError. Here each is either repaired, with a counted sentence in
``repairs``, or refused with a ``DatasetError`` that names the file and the entry.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddetr_cli.data.jsonfile import box, kind, number, plain_id, read_json, short, some
from ddetr_cli.data.locate import Purpose
from ddetr_cli.data.records import CocoAnnotation, CocoAnnotations, CocoCategory, CocoImage, ImageId
from ddetr_cli.errors import DatasetError


def read_annotations(
    path: Path, *, purpose: Purpose = "eval", skip_bad: bool = False, max_bad: float = 0.05
) -> CocoAnnotations:
    """The annotation file ``path``, ready for training or for scoring.

    Both: missing ``area`` becomes w*h and missing ``iscrowd`` 0; ``iscrowd`` may be 0, 1, true, false, "0", "1";
    annotation ids that are missing, repeated or 0 are renumbered from 1. ``train`` clips boxes to their image
    and drops those under one pixel or outside it; annotations of unknown images or categories are refused.
    ``eval`` scores boxes as they stand, dropping only those without width or height, and, as pycocotools does,
    annotations of unknown images or categories.

    ``skip_bad`` drops annotations that are otherwise refused, up to the share ``max_bad`` of all. Raises
    DatasetError for everything that cannot be repaired.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise DatasetError(
            f"{path}: top level is {kind(document)}, not an object with images, annotations and categories. "
            "Give a COCO annotation file."
        )
    notes: list[str] = []
    categories = _categories(path, _list_of(path, document, "categories"), notes)
    images = _images(path, _list_of(path, document, "images"), notes)
    raw = _list_of(path, document, "annotations")
    reader = _AnnotationReader(path, images, categories, purpose)
    annotations = reader.read(raw, skip_bad=skip_bad, max_bad=max_bad)
    if not annotations:
        raise DatasetError(f"{path}: no usable annotation among {len(raw)}, nothing to {purpose} on. Check the file.")
    return CocoAnnotations(path, images, tuple(annotations), categories, tuple(notes + reader.notes(len(raw))))


class _AnnotationReader:
    """Turns the raw ``annotations`` list into CocoAnnotation, counting what it repairs and drops by kind."""

    def __init__(
        self, path: Path, images: tuple[CocoImage, ...], categories: tuple[CocoCategory, ...], purpose: Purpose
    ) -> None:
        self.path = path
        self.images = {image.id: image for image in images}
        self.categories = {category.id for category in categories}
        self.purpose = purpose
        self.repaired: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.bad: list[str] = []
        self.without_id = 0

    def read(self, raw: list[Any], *, skip_bad: bool, max_bad: float) -> list[CocoAnnotation]:
        rows: list[CocoAnnotation] = []
        for index, entry in enumerate(raw):
            try:
                row = self._row(index, entry)
            except _BadAnnotation as error:
                self.bad.append(str(error))
                continue
            if row is not None:
                rows.append(row)
        if self.bad and not skip_bad:
            raise DatasetError(
                f"{self.path}: {len(self.bad)} of {len(raw)} annotations are unusable ({some(self.bad)}). "
                "Correct the file."
            )
        if len(self.bad) > max_bad * len(raw):
            raise DatasetError(
                f"{self.path}: {len(self.bad)} of {len(raw)} annotations are unusable, more than {max_bad:.0%} "
                f"({some(self.bad)}). Correct the file."
            )
        self._refuse_xyxy(rows)
        annotations = self._with_ids(rows)
        if annotations and not any(annotation.area for annotation in annotations):
            self.repaired["area 0 everywhere, replaced by w*h"] += len(annotations)
            annotations = [replace(a, area=a.bbox_xywh[2] * a.bbox_xywh[3]) for a in annotations]
        if self.purpose == "eval":
            return annotations
        return [clipped for clipped in map(self._clipped, annotations) if clipped is not None]

    def notes(self, total: int) -> list[str]:
        """One sentence per kind of repair."""
        notes = [f"{count} of {total} annotations: {what}" for what, count in self.repaired.items()]
        notes += [f"{count} of {total} annotations dropped: {what}" for what, count in self.dropped.items()]
        if self.bad:
            notes.append(f"{len(self.bad)} of {total} annotations dropped: unusable ({some(self.bad)})")
        return [f"{self.path}: {note}." for note in notes]

    def _row(self, index: int, entry: Any) -> CocoAnnotation | None:
        """One annotation, or None where it is dropped and counted; its id is 0 where the file has none."""
        if not isinstance(entry, dict):
            raise _BadAnnotation(f"entry {index} is {kind(entry)}, not an object")
        label = f"annotation id {entry['id']!r}" if "id" in entry else f"entry {index}"
        for key in ("image_id", "category_id", "bbox"):
            if key not in entry:
                raise _BadAnnotation(f"{label} has no {key!r}")
        image_id, category_id = plain_id(entry["image_id"]), plain_id(entry["category_id"])
        if image_id is None or category_id is None:
            raise _BadAnnotation(f"{label} has an image_id or category_id that is neither integer nor string")
        for is_known, what, value in (
            (image_id in self.images, "image", image_id),
            (category_id in self.categories, "category", category_id),
        ):
            if not is_known and self.purpose == "train":
                raise _BadAnnotation(f"{label} belongs to the missing {what} {value!r}")
            if not is_known:
                self.dropped["of an image or category that the file does not list"] += 1
                return None
        bbox = box(entry["bbox"])
        if bbox is None:
            raise _BadAnnotation(f"{label} has bbox {short(entry['bbox'])}, not four finite numbers")
        if bbox[2] <= 0 or bbox[3] <= 0:
            self.dropped["bbox without width or height"] += 1
            return None
        area, is_crowd = self._area(label, entry, bbox), self._is_crowd(label, entry)
        own_id = plain_id(entry.get("id"))
        self.without_id += own_id is None
        return CocoAnnotation(0 if own_id is None else own_id, image_id, category_id, bbox, area, is_crowd)

    def _area(self, label: str, entry: dict[str, Any], bbox: tuple[float, float, float, float]) -> float:
        if entry.get("area") is None:
            self.repaired["area missing, filled with w*h"] += 1
            return bbox[2] * bbox[3]
        area = number(entry["area"])
        if area is None or area < 0:
            raise _BadAnnotation(f"{label} has area {short(entry['area'])}, not a number >= 0")
        return area

    def _is_crowd(self, label: str, entry: dict[str, Any]) -> bool:
        value = entry.get("iscrowd")
        if value is None:
            self.repaired["iscrowd missing, filled with 0"] += 1
            return False
        if isinstance(value, (int, float)) and value in (0, 1):
            if isinstance(value, (bool, float)):
                self.repaired["iscrowd written as true, false or a decimal, taken as 0 or 1"] += 1
            return bool(value)
        if value in ("0", "1"):
            self.repaired["iscrowd written as a string, taken as a number"] += 1
            return bool(value == "1")
        raise _BadAnnotation(f"{label} has iscrowd {short(value)}, neither 0 nor 1")

    def _with_ids(self, rows: list[CocoAnnotation]) -> list[CocoAnnotation]:
        """The file's ids where they are good; otherwise all renumbered from 1 (COCOeval takes id 0 for no match)."""
        ids = [row.id for row in rows if row.id != 0]
        faults = [
            fault
            for fault, is_so in (
                ("missing", self.without_id > 0),
                ("0", len(rows) - len(ids) > self.without_id),
                ("repeated", len(set(ids)) < len(ids)),
            )
            if is_so
        ]
        if not faults:
            return rows
        self.repaired[f"ids {' and '.join(faults)}, renumbered from 1 in memory"] += len(rows)
        return [replace(row, id=index + 1) for index, row in enumerate(rows)]

    def _clipped(self, annotation: CocoAnnotation) -> CocoAnnotation | None:
        """For training: the part inside the image, or None, counted, where less than a pixel is left."""
        image = self.images[annotation.image_id]
        x, y, w, h = annotation.bbox_xywh
        if w < 1 or h < 1:
            self.dropped["bbox under one pixel wide or high"] += 1
            return None
        x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(image.width)), min(y + h, float(image.height))
        if x1 - x0 < 1 or y1 - y0 < 1:
            self.dropped["bbox outside its image"] += 1
            return None
        # COCO's own boxes pass the border by rounding; less than a hundredth of a pixel is not worth a sentence.
        if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > 0.01:
            self.repaired["bbox partly outside its image, clipped"] += 1
        elif (x0, y0) == (x, y) and x1 == x + w and y1 == y + h:
            return annotation
        return replace(annotation, bbox_xywh=(x0, y0, x1 - x0, y1 - y0))

    def _refuse_xyxy(self, rows: list[CocoAnnotation]) -> None:
        """Raise where the boxes are corners x1,y1,x2,y2 rather than x,y,w,h.

        Read as corners every box must be a proper one inside its image. Then, read as x,y,w,h, either most must
        stick out of it, or most stored areas must be those of the corners and not w*h.
        """
        proper = beyond = area_of_corners = 0
        for row in rows:
            image = self.images[row.image_id]
            a, b, c, d = row.bbox_xywh
            proper += c > a and d > b and c <= image.width + 1 and d <= image.height + 1
            beyond += a + c > image.width + 1 or b + d > image.height + 1
            corners = (c - a) * (d - b)
            area_of_corners += math.isclose(row.area, corners, rel_tol=0.01) and not math.isclose(
                row.area, c * d, rel_tol=0.05
            )
        # One box in a hundred may be a slip of its own.
        if rows and proper >= 0.99 * len(rows) and max(beyond, area_of_corners) > len(rows) / 2:
            raise DatasetError(
                f"{self.path}: bbox looks like xyxy (as x,y,w,h {beyond} of {len(rows)} boxes pass the border of "
                f"their image, {area_of_corners} areas fit corners only). Convert the boxes to [x, y, width, height]."
            )


class _BadAnnotation(Exception):
    """Why one annotation is unusable; collected, never leaves this file."""


def _list_of(path: Path, document: dict[str, Any], key: str) -> list[Any]:
    if key not in document:
        there = some(sorted(map(str, document)))
        raise DatasetError(f"{path}: no key {key!r} (there are: {there}). Give a COCO annotation file.")
    if not isinstance(document[key], list):
        raise DatasetError(f"{path}: {key!r} is {kind(document[key])}, not a list. Give a COCO annotation file.")
    return document[key]  # type: ignore[no-any-return]


def _categories(path: Path, raw: list[Any], notes: list[str]) -> tuple[CocoCategory, ...]:
    categories: list[CocoCategory] = []
    renamed = 0
    for index, entry in enumerate(raw):
        category_id = _required_id(path, "categories", index, entry)
        name = _required(path, "categories", index, entry, "name")
        renamed += not isinstance(name, str)
        categories.append(CocoCategory(category_id, str(name)))
    if not categories:
        raise DatasetError(f"{path}: 'categories' is empty. List at least one category.")
    _refuse_repeated(path, "category id", [category.id for category in categories])
    if renamed:
        notes.append(f"{path}: {renamed} of {len(categories)} category names are not strings, taken as text.")
    return tuple(categories)


def _images(path: Path, raw: list[Any], notes: list[str]) -> tuple[CocoImage, ...]:
    images: list[CocoImage] = []
    for index, entry in enumerate(raw):
        image_id = _required_id(path, "images", index, entry)
        file_name = _required(path, "images", index, entry, "file_name")
        if not isinstance(file_name, str) or not file_name:
            raise DatasetError(
                f"{path}: images[{index}] (id {image_id!r}) has file_name {short(file_name)}. Name it."
            )
        width, height = (number(_required(path, "images", index, entry, key)) for key in ("width", "height"))
        if not width or not height or min(width, height) < 1 or width % 1 or height % 1:
            raise DatasetError(
                f"{path}: images[{index}] (id {image_id!r}) has width {short(entry['width'])} and height "
                f"{short(entry['height'])}. Give its size in pixels."
            )
        images.append(CocoImage(image_id, file_name, int(width), int(height)))
    if not images:
        raise DatasetError(f"{path}: 'images' is empty. List at least one image.")
    _refuse_repeated(path, "image id", [image.id for image in images])
    _refuse_repeated(path, "file_name", [image.file_name for image in images])
    return tuple(images)


def _required(path: Path, key: str, index: int, entry: Any, field: str) -> Any:
    if not isinstance(entry, dict):
        raise DatasetError(f"{path}: {key}[{index}] is {kind(entry)}, not an object. Give a COCO annotation file.")
    if field not in entry:
        raise DatasetError(f"{path}: {key}[{index}] has no {field!r}. Give a COCO annotation file.")
    return entry[field]


def _required_id(path: Path, key: str, index: int, entry: Any) -> ImageId:
    found = plain_id(_required(path, key, index, entry, "id"))
    if found is None:
        raise DatasetError(f"{path}: {key}[{index}] has id {short(entry['id'])}, no integer or string. Correct it.")
    return found


def _refuse_repeated(path: Path, what: str, values: list[Any]) -> None:
    repeated = [repr(value) for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise DatasetError(f"{path}: {len(repeated)} {what}s occur repeatedly ({some(repeated)}). Make them unique.")
