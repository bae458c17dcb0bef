"""The annotations of a COCO document, entry by entry: taken, repaired, dropped, or counted as bad."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ddetr_cli.data.entries import missing_field
from ddetr_cli.data.findings import Finding, Tally
from ddetr_cli.data.jsonfile import box, number, plain_id, short
from ddetr_cli.data.locate import Purpose
from ddetr_cli.data.records import CocoAnnotation, CocoCategory, CocoImage

_REQUIRED = frozenset({"image_id", "category_id", "bbox"})


class AnnotationReader:
    """Turns the raw ``annotations`` list into CocoAnnotation, counting what it repairs, drops and refuses by kind."""

    def __init__(
        self, images: tuple[CocoImage, ...], categories: tuple[CocoCategory, ...], purpose: Purpose, total: int
    ) -> None:
        self.images = {image.id: image for image in images}
        self.categories = {category.id: category.id for category in categories}
        self.purpose = purpose
        self.total = total
        self.tally = Tally("annotations", total)
        self.bad = Tally("annotations", total)
        self.bad_count = 0
        self.without_id = 0

    def read(self, raw: list[Any]) -> list[CocoAnnotation]:
        """The usable annotations. Empties ``raw`` as it goes: of a big file there is no room for both."""
        rows: list[CocoAnnotation] = []
        for index, entry in enumerate(raw):
            try:
                row = self._row(entry)
            except _BadAnnotation as error:
                self.bad_count += 1
                self.bad.add("refused", error.what, f"{_label(index, entry)}{error.detail}")
                continue
            finally:
                raw[index] = None
            if row is not None:
                rows.append(row)
        self._find_xyxy(rows)
        if self.purpose == "train":  # before the ids change: findings name those of the file
            rows = [clipped for clipped in map(self._clipped, rows) if clipped is not None]
        annotations = self._with_ids(rows)
        if annotations and not any(annotation.area for annotation in annotations):
            self.tally.add("repaired", "area 0 everywhere, replaced by w*h", count=len(annotations))
            annotations = [replace(a, area=a.bbox_xywh[2] * a.bbox_xywh[3]) for a in annotations]
        return annotations

    def findings(self, *, skip_bad: bool, max_bad: float) -> tuple[Finding, ...]:
        """What was counted; with ``skip_bad`` bad ones are dropped, unless they are more than ``max_bad`` of all."""
        bad = self.bad.findings()
        is_too_many = self.bad_count > max_bad * self.total
        if is_too_many and skip_bad:
            what = f"unusable, more than the {max_bad:.3g} of all that --skip-bad-annotations may drop"
            remedy = "Correct the file, or raise --max-bad."
            whole = Finding("refused", what, self.bad_count, self.total, "annotations", bad[0].examples, remedy)
            bad = (whole, *(replace(finding, outcome="dropped") for finding in bad))
        elif skip_bad:
            bad = tuple(replace(finding, outcome="dropped") for finding in bad)
        else:
            remedy = "Correct the file" + ("." if is_too_many else ", or pass --skip-bad-annotations.")
            bad = tuple(replace(finding, remedy=remedy) for finding in bad)
        return bad + self.tally.findings()

    def _row(self, entry: Any) -> CocoAnnotation | None:
        """One annotation, or None where it is dropped and counted; its id is 0 where the file has none."""
        fault = missing_field(entry, _REQUIRED)
        if fault:
            raise _BadAnnotation(fault)
        image_id, category_id = plain_id(entry["image_id"]), plain_id(entry["category_id"])
        if image_id is None or category_id is None:
            raise _BadAnnotation("image_id or category_id is neither integer nor string")
        is_known = image_id in self.images
        if not is_known or category_id not in self.categories:
            what, value = ("a category", category_id) if is_known else ("an image", image_id)
            unlisted = _BadAnnotation(f"of {what} that is not listed", value)
            if self.purpose == "train":
                raise unlisted
            # As pycocotools does it.
            self.tally.add("dropped", unlisted.what, f"annotation id {entry.get('id')!r}{unlisted.detail}")
            return None
        bbox = box(entry["bbox"])
        if bbox is None:
            raise _BadAnnotation("bbox is not four finite numbers", entry["bbox"])
        if bbox[2] <= 0 or bbox[3] <= 0:
            self.tally.add(
                "dropped",
                "bbox without width or height",
                f"annotation id {entry.get('id')!r}: {short(entry['bbox'])}",
            )
            return None
        area, is_crowd = self._area(entry, bbox), self._is_crowd(entry)
        own_id = plain_id(entry.get("id"))
        self.without_id += own_id is None
        # The image's own objects for the ids: a million of equal integers fewer.
        return CocoAnnotation(
            0 if own_id is None else own_id,
            self.images[image_id].id,
            self.categories[category_id],
            bbox,
            area,
            is_crowd,
        )

    def _area(self, entry: dict[str, Any], bbox: tuple[float, float, float, float]) -> float:
        if entry.get("area") is None:
            self.tally.add("repaired", "area missing, filled with w*h")
            return bbox[2] * bbox[3]
        area = number(entry["area"])
        if area is None or area < 0:
            raise _BadAnnotation("area is not a number >= 0", entry["area"])
        return area

    def _is_crowd(self, entry: dict[str, Any]) -> bool:
        value = entry.get("iscrowd")
        if value is None:
            self.tally.add("repaired", "iscrowd missing, filled with 0")
            return False
        if isinstance(value, (int, float)) and value in (0, 1):
            if isinstance(value, (bool, float)):
                self.tally.add("repaired", "iscrowd written as true, false or a decimal, taken as 0 or 1")
            return bool(value)
        if value in ("0", "1"):
            self.tally.add("repaired", "iscrowd written as a string, taken as a number")
            return bool(value == "1")
        raise _BadAnnotation("iscrowd is neither 0 nor 1", value)

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
        self.tally.add("repaired", f"ids {' and '.join(faults)}, renumbered from 1 in memory", count=len(rows))
        return [replace(row, id=index + 1) for index, row in enumerate(rows)]

    def _clipped(self, annotation: CocoAnnotation) -> CocoAnnotation | None:
        """For training: the part inside the image, or None, counted, where less than a pixel is left."""
        image = self.images[annotation.image_id]
        x, y, w, h = annotation.bbox_xywh
        if w < 1 or h < 1:
            self.tally.add("dropped", "bbox under one pixel wide or high", f"annotation id {annotation.id!r}")
            return None
        x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(image.width)), min(y + h, float(image.height))
        if x1 - x0 < 1 or y1 - y0 < 1:
            self.tally.add("dropped", "bbox outside its image", f"annotation id {annotation.id!r}")
            return None
        # COCO's own boxes pass the border by rounding; less than a hundredth of a pixel is not worth a sentence.
        if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > 0.01:
            self.tally.add("repaired", "bbox partly outside its image, clipped", f"annotation id {annotation.id!r}")
        elif (x0, y0) == (x, y) and x1 == x + w and y1 == y + h:
            return annotation
        return replace(annotation, bbox_xywh=(x0, y0, x1 - x0, y1 - y0))

    def _find_xyxy(self, rows: list[CocoAnnotation]) -> None:
        """Refuse boxes that are corners x1,y1,x2,y2 rather than x,y,w,h.

        Read as corners every box must be a proper one inside its image. Then, read as x,y,w,h, either most must
        stick out of it, or most stored areas must be those of the corners and not w*h.
        """
        improper = beyond = area_of_corners = 0
        for row in rows:
            image = self.images[row.image_id]
            a, b, c, d = row.bbox_xywh
            if c <= a or d <= b or c > image.width + 1 or d > image.height + 1:
                improper += 1
                # One box in a hundred may be a slip of its own.
                if improper > 0.01 * len(rows):
                    return
            beyond += a + c > image.width + 1 or b + d > image.height + 1
            corners = (c - a) * (d - b)
            area_of_corners += math.isclose(row.area, corners, rel_tol=0.01) and not math.isclose(
                row.area, c * d, rel_tol=0.05
            )
        if max(beyond, area_of_corners) > len(rows) / 2:
            self.tally.add(
                "refused",
                f"bbox looks like xyxy (as x,y,w,h {beyond} of {len(rows)} boxes pass the border of their image, "
                f"{area_of_corners} areas fit corners only)",
                count=0,
                remedy="Convert the boxes to [x, y, width, height].",
            )


class _BadAnnotation(Exception):
    """Why one annotation is unusable; collected, never leaves this file."""

    def __init__(self, what: str, *value: Any) -> None:
        super().__init__(what)
        self.what, self.detail = what, "".join(f": {short(v)}" for v in value)


def _label(index: int, entry: Any) -> str:
    return f"annotation id {entry['id']!r}" if isinstance(entry, dict) and "id" in entry else f"entry {index}"
