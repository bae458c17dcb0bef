"""COCO results and the images they refer to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ddetr_cli.atomic import AtomicFile
from ddetr_cli.detect.sinks.formats import DETECTIONS_FILE, IMAGES_FILE
from ddetr_cli.detect.sinks.writing import coco_rows, describe, to_json

if TYPE_CHECKING:
    from pathlib import Path

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.results import ImageResult
    from ddetr_cli.detect.sinks.writing import Target


class CocoRowsSink:
    """A COCO results list, one detection a line."""

    render = None

    def __init__(self, target: Target, classes: ClassTable) -> None:
        self._classes = classes
        self._target = target
        self._separator = b"\n"
        target.write(b"[")

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Append the image's detections."""
        rows = b",\n".join(to_json(row) for row in coco_rows(result, self._classes))
        if rows:
            self._target.write(self._separator + rows)
            self._separator = b",\n"

    def finish(self) -> None:
        """Close the list."""
        self._target.write(b"\n]\n")
        self._target.commit(durable=True)

    def abandon(self) -> None:
        """Drop what was not finished."""
        self._target.abandon()


class CocoSink:
    """``detections.json``, a COCO results list, and ``images.json``, the images and categories it refers to.

    Both stream to disk as results come and appear at the end, together. An ``images.json`` with its empty
    annotation list is the ground-truth file pycocotools' ``loadRes`` needs. (``loadRes`` itself cannot take an
    empty results list: a run that found nothing has nothing to load.)
    """

    render = None

    def __init__(self, output: Path, classes: ClassTable, info: dict[str, Any]) -> None:
        self._classes = classes
        self._images = AtomicFile(output / IMAGES_FILE)
        self._images.write(b'{\n"info": %s,\n"licenses": [],\n"images": [' % to_json(info))
        self._separator = b"\n"
        try:
            self._rows = CocoRowsSink(AtomicFile(output / DETECTIONS_FILE), classes)
        except BaseException:
            self._images.abandon()
            raise

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Append the image and its detections."""
        record = {"id": result.image_id, **describe(result)}
        if result.truncated:
            record["truncated"] = True
        self._images.write(self._separator + to_json(record))
        self._separator = b",\n"
        self._rows.add(result, None)

    def finish(self) -> None:
        """Make both final. ``images.json`` goes first: detections never stand beside images they do not mean."""
        end = b"]" if self._separator == b"\n" else b"\n]"
        categories = b",\n".join(to_json(category) for category in self._classes.to_categories())
        self._images.write(end + b',\n"annotations": [],\n"categories": [\n' + categories + b"\n]\n}\n")
        self._images.commit(durable=True)
        self._rows.finish()

    def abandon(self) -> None:
        """Remove the temporary files."""
        self._images.abandon()
        self._rows.abandon()
