"""What a run leaves in its output folder: COCO results, the list of images, annotated pictures."""

from __future__ import annotations

import hashlib
import io
import json
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ddetr_cli.atomic import (
    AtomicFile,
    check_new_folder,
    check_writable,
    ignores_case,
    remove_leftovers,
    write_atomically,
)
from ddetr_cli.detect.drawing import draw_detections
from ddetr_cli.detect.sources import PICTURES_FOLDER, RESULT_FILES, Input, check_names_are_distinct
from ddetr_cli.errors import OutputError, UsageError
from ddetr_cli.inference.results import coco_row

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from PIL import Image

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.run import ImageResult

DETECTIONS_FILE, IMAGES_FILE = RESULT_FILES

# Formats a browser shows are kept; every other picture is drawn to a JPEG of its full name plus .jpg.
_KEPT_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG"}
_LONGEST_NAME = 255  # bytes, on every common file system
_LONGEST_SIDE = 65_500  # what a JPEG can hold


def picture_name(name: str) -> str:
    """Where below ``annotated/`` the picture of input ``name`` is drawn; the ending says in which format."""
    path = PurePosixPath(name)
    if path.suffix.lower() in _KEPT_SUFFIXES:
        return name
    final = path.name + ".jpg"
    if len(os.fsencode(final)) > _LONGEST_NAME:
        raw = os.fsencode(path.name)
        # Cut inside a character is fine: what cannot be decoded is kept as it is, byte by byte.
        final = os.fsdecode(raw[:230]) + "-" + hashlib.sha256(raw).hexdigest()[:12] + ".jpg"
    return str(path.with_name(final))


def prepare_output(output: Path, inputs: Sequence[Input], *, overwrite: bool, formats: Collection[str]) -> None:
    """Refuse, before any work, an output that could lose something or cannot be written; leaves nothing behind.

    Raises OutputError for a folder that exists (unless ``overwrite``) or is not writable, and UsageError where the
    output is a file, would replace an input, or two inputs would meet in one output.
    """
    check_new_folder(output, overwrite=overwrite)
    readable = [item for item in inputs if item.failure is None]
    name_of = picture_name if "images" in formats else str
    folded = {name_of(item.name).casefold() for item in readable}
    check_names_are_distinct(
        readable, output_name=name_of, ignore_case=len(folded) < len(readable) and ignores_case(output)
    )
    if not overwrite:
        return
    pictures = output / PICTURES_FOLDER
    if "images" in formats and pictures.exists():
        check_writable(pictures)
        real = {os.path.realpath(item.path) for item in readable}
        for item in readable:
            if os.path.realpath(pictures / picture_name(item.name)) in real:
                raise UsageError(
                    f"{item.path}: its annotated picture would replace an input. Choose another --output."
                )
    for name in (DETECTIONS_FILE, IMAGES_FILE):
        if (output / name).is_dir():
            raise OutputError(
                f"{output / name}: not written (a folder of that name is there). Choose another --output."
            )
    remove_leftovers(output)


class CocoSink:
    """``detections.json``, a COCO results list, and ``images.json``, the images and categories it refers to.

    Results stream to disk as they come; both files appear at the end, together. An ``images.json`` with its empty
    annotation list is the ground-truth file pycocotools' ``loadRes`` needs. (``loadRes`` itself cannot take an
    empty results list: a run that found nothing has nothing to load.)
    """

    render = None

    def __init__(self, output: Path, classes: ClassTable, info: dict[str, Any]) -> None:
        self._output = output
        self._classes = classes
        self._info = info
        self._images: list[dict[str, Any]] = []
        self._is_first = True
        self._detections = AtomicFile(output / DETECTIONS_FILE)
        self._detections.write(b"[")

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Append the image's detections, one line each, and remember the image."""
        width, height = result.size_wh or (None, None)
        record = {"id": result.image_id, "file_name": result.input.name, "width": width, "height": height}
        if result.failure is not None:
            record["failed"] = result.failure
        self._images.append(record)
        for box, score, label in zip(result.boxes_xyxy_px, result.scores, result.labels, strict=True):
            line = coco_row(result.image_id, self._classes.category_ids[label], box, score)
            self._detections.write((b"\n" if self._is_first else b",\n") + _json(line))
            self._is_first = False

    def finish(self) -> None:
        """Write both files. ``images.json`` goes first: detections never stand beside images they do not mean."""
        images = {
            "info": self._info,
            "licenses": [],
            "images": self._images,
            "annotations": [],
            "categories": self._classes.to_categories(),
        }
        rows = b",\n".join(b'"%s": %s' % (key.encode(), _rows(value)) for key, value in images.items())
        self._detections.write(b"\n]\n")
        write_atomically(self._output / IMAGES_FILE, b"{\n" + rows + b"\n}\n", durable=True)
        self._detections.commit(durable=True)

    def abandon(self) -> None:
        """Remove the temporary file."""
        self._detections.abandon()


class PicturesSink:
    """``annotated/``: every picture with its boxes, under the path the input has in its source."""

    def __init__(self, output: Path, classes: ClassTable) -> None:
        self._folder = output / PICTURES_FOLDER
        self._classes = classes
        self._written: set[str] = set()
        # Read before the run replaces it: whatever an earlier run drew and this one does not is stale.
        self._earlier = _earlier_pictures(output)

    def render(self, result: ImageResult, picture: Image.Image) -> bytes:
        """The file of the picture with its boxes."""
        name = picture_name(result.input.name)
        drawn = draw_detections(
            picture,
            result.boxes_xyxy_px,
            result.labels,
            result.scores,
            [self._classes.name(label) for label in result.labels],
        )
        drawn.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        buffer = io.BytesIO()
        if _KEPT_SUFFIXES[PurePosixPath(name).suffix.lower()] == "PNG":
            drawn.save(buffer, "PNG", compress_level=4)
        else:
            drawn.save(buffer, "JPEG", quality=92, subsampling=0)  # thin coloured lines smear when chroma is halved
        return buffer.getvalue()

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Write one picture; a failed image has none."""
        if rendered is None:
            return
        name = picture_name(result.input.name)
        write_atomically(self._folder / name, rendered, durable=False)
        self._written.add(name)

    def finish(self) -> None:
        """Remove what an earlier run drew for images that are no longer among the inputs."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        for name in self._earlier - self._written:
            with suppress(OSError):
                (self._folder / name).unlink()

    def abandon(self) -> None:
        """Nothing to do: every picture is written whole or not at all."""


def _earlier_pictures(output: Path) -> set[str]:
    """Names below ``annotated/`` that the ``images.json`` of an earlier run of ours accounts for."""
    try:
        earlier = json.loads((output / IMAGES_FILE).read_bytes())
        if not str(earlier["info"]["description"]).startswith("ddetr detect"):
            return set()
        names = [picture_name(str(image["file_name"])) for image in earlier["images"] if "failed" not in image]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    # The file may have been edited: nothing outside the folder is ever touched.
    return {name for name in names if not name.startswith("/") and ".." not in PurePosixPath(name).parts}


def _rows(value: object) -> bytes:
    """JSON of a value; a list takes one line per element, so that the file can be read and compared."""
    if not isinstance(value, list) or not value:
        return _json(value)
    return b"[\n" + b",\n".join(_json(element) for element in value) + b"\n]"


def _json(value: object) -> bytes:
    # ASCII: a file name that is not UTF-8 becomes a lone surrogate escape, which os.fsencode turns back.
    return json.dumps(value, allow_nan=False, ensure_ascii=True).encode("ascii")
