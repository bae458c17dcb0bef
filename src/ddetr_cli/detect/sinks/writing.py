"""How results become bytes, and where the bytes go."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

from ddetr_cli.inference.results import coco_row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.results import ImageResult


class Target(Protocol):
    """A file that is being written: ``atomic.AtomicFile``, or stdout. Raises OutputError."""

    def write(self, data: bytes) -> None:
        """Append ``data``."""

    def commit(self, *, durable: bool) -> None:
        """Everything is written."""

    def abandon(self) -> None:
        """Nothing more will come."""


def to_json(value: object) -> bytes:
    """One line of JSON."""
    # ASCII: a file name that is not UTF-8 becomes a lone surrogate escape, which os.fsencode turns back.
    return json.dumps(value, allow_nan=False, ensure_ascii=True).encode("ascii")


def to_text(value: str) -> bytes:
    """UTF-8; bytes of a file name that are not UTF-8 appear as ``\\udcff``, so that the file stays readable."""
    return value.encode("utf-8", "backslashreplace")


def coco_rows(result: ImageResult, classes: ClassTable) -> Iterator[dict[str, Any]]:
    """The rows of a COCO results file for one image."""
    for box, score, label in zip(result.boxes_xyxy_px, result.scores, result.labels, strict=True):
        yield coco_row(result.image_id, classes.category_ids[label], box, score)


def describe(result: ImageResult) -> dict[str, Any]:
    """What every record of an image says of it besides its id: name, size, and the reason where it failed."""
    width, height = size_of(result)
    record: dict[str, Any] = {"file_name": result.input.name, "width": width, "height": height}
    if result.failure is not None:
        record["failed"] = result.failure
    return record


def size_of(result: ImageResult) -> tuple[int | None, int | None]:
    """Width and height of the upright picture; None twice where it was never read."""
    return result.size_wh or (None, None)
