"""Where the files of one input go, and which files an earlier run left for inputs that are gone."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ddetr_cli.detect.sinks.formats import IMAGES_FILE

if TYPE_CHECKING:
    from collections.abc import Callable

# Formats a browser shows are kept; every other picture is drawn to a JPEG of its full name plus .jpg.
KEPT_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG"}
_LONGEST_NAME = 255  # bytes, on every common file system


def picture_name(name: str) -> str:
    """Where below ``annotated/`` the picture of input ``name`` is drawn; the ending says in which format."""
    path = PurePosixPath(name)
    return name if path.suffix.lower() in KEPT_SUFFIXES else _with_ending(path, path.name, ".jpg")


def label_name(name: str) -> str:
    """Where below ``labels/`` the boxes of input ``name`` go: its ending replaced, as YOLO's readers expect."""
    path = PurePosixPath(name)
    return _with_ending(path, path.stem, ".txt")


def _with_ending(path: PurePosixPath, stem: str, ending: str) -> str:
    final = stem + ending
    if len(os.fsencode(final)) > _LONGEST_NAME:
        raw = os.fsencode(path.name)
        # Cut inside a character is fine: what cannot be decoded is kept as it is, byte by byte.
        final = os.fsdecode(raw[:230]) + "-" + hashlib.sha256(raw).hexdigest()[:12] + ending
    return str(path.with_name(final))


class Stale:
    """What an earlier run of ours left below ``folder`` for its inputs, less what this run ``keep``s."""

    def __init__(self, output: Path, folder: Path, name_of: Callable[[str], str]) -> None:
        # Read before the run replaces the file.
        self._names = {name_of(name) for name in _earlier_inputs(output)}
        self._folder = folder
        self._name_of = name_of

    def keep(self, name: str) -> None:
        """This run has the input ``name`` too."""
        self._names.discard(self._name_of(name))

    def paths(self) -> list[Path]:
        """What may be removed."""
        return [self._folder / name for name in sorted(self._names)]


def _earlier_inputs(output: Path) -> list[str]:
    """The inputs that the ``images.json`` of an earlier run of ours accounts for."""
    try:
        earlier = json.loads((output / IMAGES_FILE).read_bytes())
        if not str(earlier["info"]["description"]).startswith("ddetr detect"):
            return []
        names = [str(image["file_name"]) for image in earlier["images"] if "failed" not in image]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    # The file may have been edited: nothing outside the folder is ever touched.
    return [name for name in names if not name.startswith("/") and ".." not in PurePosixPath(name).parts]
