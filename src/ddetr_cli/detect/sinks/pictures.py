"""Pictures with their boxes, and every box cut out."""

from __future__ import annotations

import io
import re
import struct
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ddetr_cli.atomic import write_atomically
from ddetr_cli.detect.drawing import clip, draw_detections, label_name
from ddetr_cli.detect.sinks.names import KEPT_SUFFIXES, Stale, picture_name
from ddetr_cli.detect.sources import CROPS_FOLDER, PICTURES_FOLDER

if TYPE_CHECKING:
    from PIL import Image

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.results import ImageResult

_LONGEST_SIDE = 65_500  # what a JPEG can hold
_OUR_CROP = re.compile(r"\d{4,}-[01]\.\d\d-.*\.jpg", re.DOTALL)
_LONGEST_LABEL = 60  # letters of a class name within a file name


class PicturesSink:
    """``annotated/``: every picture with its boxes, under the path the input has in its source."""

    def __init__(self, output: Path, classes: ClassTable) -> None:
        self._folder = output / PICTURES_FOLDER
        ids = classes.category_ids
        self._names = [label_name(classes.name(index), ids[index]) for index in range(len(classes))]
        self._stale = Stale(output, self._folder, picture_name)

    def render(self, result: ImageResult, picture: Image.Image) -> bytes:
        """The file of the picture with its boxes."""
        drawn = draw_detections(
            picture,
            result.boxes_xyxy_px,
            result.labels,
            result.scores,
            [self._names[label] for label in result.labels],
        )
        suffix = PurePosixPath(picture_name(result.input.name)).suffix.lower()
        return _encode(drawn, KEPT_SUFFIXES[suffix])

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Write one picture; a failed image has none, and that of a result handed over again is there."""
        name = result.input.name
        if result.failure is None:
            self._stale.keep(name)
        if rendered is not None:
            write_atomically(self._folder / picture_name(name), rendered, durable=False)

    def finish(self) -> None:
        """Remove what an earlier run drew for images that are no longer among the inputs."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._stale.paths():
            with suppress(OSError):
                path.unlink()

    def abandon(self) -> None:
        """Nothing to do: every picture is written whole or not at all."""


class CropsSink:
    """``crops/``: a folder per picture, named as it is, and in it a JPEG per detection: ``0001-0.93-person.jpg``.

    Sorted by name they come picture by picture, best first. A box that lies outside its picture has no crop.
    """

    def __init__(self, output: Path, classes: ClassTable) -> None:
        self._folder = output / CROPS_FOLDER
        self._classes = classes
        self._stale = Stale(output, self._folder, str)

    def render(self, result: ImageResult, picture: Image.Image) -> bytes:
        """The files of all crops in one piece, each behind its length; no bytes where a box is off the picture."""
        files = []
        for box in result.boxes_xyxy_px:
            part = clip(box, *picture.size)
            crop = b""
            if part is not None:
                cut = picture.crop((part[0], part[1], part[2] + 1, part[3] + 1))
                cut.info = {}
                crop = _encode(cut, "JPEG")
            files.append(struct.pack("<Q", len(crop)) + crop)
        return b"".join(files)

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Write the crops of one picture."""
        if result.failure is None:
            self._stale.keep(result.input.name)
        if rendered is None:
            return
        folder = self._folder / result.input.name
        offset = 0
        written = set()
        for rank, (score, label) in enumerate(zip(result.scores, result.labels, strict=True), start=1):
            (length,) = struct.unpack_from("<Q", rendered, offset)
            start, offset = offset + 8, offset + 8 + length
            if length:
                name = f"{rank:04d}-{score:.2f}-{_slug(self._classes.name(label))}.jpg"
                write_atomically(folder / name, rendered[start:offset], durable=False)
                written.add(name)
        _remove_crops(folder, but=written)

    def finish(self) -> None:
        """Remove the crops of an earlier run from images that are no longer among the inputs."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        for folder in self._stale.paths():
            _remove_crops(folder, but=set())

    def abandon(self) -> None:
        """Nothing to do: every crop is written whole or not at all."""


def _remove_crops(folder: Path, but: set[str]) -> None:
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name not in but and _OUR_CROP.fullmatch(path.name):
                path.unlink()
        if not but:
            folder.rmdir()


def _slug(name: str) -> str:
    """A class name as part of a file name: letters and digits of any script, the rest as one dash."""
    return re.sub(r"[\W_]+", "-", name[:_LONGEST_LABEL]).strip("-") or "object"


def _encode(picture: Image.Image, kind: str) -> bytes:
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer = io.BytesIO()
    if kind == "PNG":
        picture.save(buffer, "PNG", compress_level=4)
    else:
        picture.save(buffer, "JPEG", quality=92, subsampling=0)  # thin coloured lines smear when chroma is halved
    return buffer.getvalue()
