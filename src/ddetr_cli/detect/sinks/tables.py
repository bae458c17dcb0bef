"""Results as JSON lines and as CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from ddetr_cli.detect.sinks.writing import coco_rows, describe, to_json, to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.results import ImageResult
    from ddetr_cli.detect.sinks.writing import Target


class JsonLinesSink:
    """One JSON object per image and line, failed images among them, with the numbers of the COCO results.

    ``image_id, file_name, width, height``, then ``detections`` (``category_id, label, bbox, score``) or, where the
    image failed, ``failed`` with the reason; ``dropped`` counts detections that were not finite numbers.
    """

    render = None

    def __init__(self, target: Target, classes: ClassTable) -> None:
        self._classes = classes
        self._target = target

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Append one line."""
        record = {"image_id": result.image_id, **describe(result)}
        if result.failure is None:
            rows = zip(coco_rows(result, self._classes), result.labels, strict=True)
            record["detections"] = [
                {
                    "category_id": row["category_id"],
                    "label": self._classes.name(label),
                    "bbox": row["bbox"],
                    "score": row["score"],
                }
                for row, label in rows
            ]
        if result.dropped:
            record["dropped"] = result.dropped
        if result.truncated:
            record["truncated"] = True
        self._target.write(to_json(record) + b"\n")

    def finish(self) -> None:
        """Make the file final."""
        self._target.commit(durable=True)

    def abandon(self) -> None:
        """Drop what was not finished."""
        self._target.abandon()


class CsvSink:
    """One row per detection (RFC 4180, UTF-8), best first within an image, with the numbers of the COCO results.

    Every row is a detection, so failed images stand in a table of their own, ``failures``, where one is given.
    """

    render = None

    def __init__(self, target: Target, classes: ClassTable, failures: Target | None = None) -> None:
        self._classes = classes
        self._target = target
        self._failures = failures
        target.write(
            _lines([("file_name", "image_id", "category_id", "label", "score", "x", "y", "width", "height")])
        )
        if failures is not None:
            failures.write(_lines([("file_name", "image_id", "failed")]))

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Append the image's rows."""
        name = result.input.name
        if result.failure is not None:
            if self._failures is not None:
                self._failures.write(_lines([(name, result.image_id, result.failure)]))
            return
        rows = [
            (name, result.image_id, row["category_id"], self._classes.name(label), row["score"], *row["bbox"])
            for row, label in zip(coco_rows(result, self._classes), result.labels, strict=True)
        ]
        if rows:
            self._target.write(_lines(rows))

    def finish(self) -> None:
        """Make both files final, the failures first."""
        if self._failures is not None:
            self._failures.commit(durable=True)
        self._target.commit(durable=True)

    def abandon(self) -> None:
        """Drop what was not finished."""
        if self._failures is not None:
            self._failures.abandon()
        self._target.abandon()


def _lines(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return to_text(text.getvalue())
