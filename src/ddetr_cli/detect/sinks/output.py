"""The checks on an output folder before anything is computed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ddetr_cli.atomic import check_new_folder, check_writable, ignores_case
from ddetr_cli.detect.sinks.formats import FORMATS
from ddetr_cli.detect.sinks.names import label_name, picture_name
from ddetr_cli.detect.sources import CROPS_FOLDER, PICTURES_FOLDER, SHEET_FILE, check_names_are_distinct
from ddetr_cli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    from ddetr_cli.detect.sources import Input

# What gives each input a place of its own; elsewhere its name does.
_NAMES: dict[str, Callable[[str], str]] = {"images": picture_name, "yolo": label_name}


def prepare_output(output: Path, inputs: Sequence[Input], *, overwrite: bool, formats: Collection[str]) -> None:
    """Refuse, before any work, an output that could lose something or cannot be written; leaves nothing behind.

    Raises OutputError for a folder that exists (unless ``overwrite``) or is not writable, and UsageError where the
    output is a file, would replace an input, or two inputs would meet in one output.
    """
    check_new_folder(output, overwrite=overwrite)
    readable = [item for item in inputs if item.failure is None]
    _check_places(output, readable, formats)
    if not overwrite:
        return
    real = {os.path.realpath(item.path): item for item in readable}
    for path, what in _replaced(output, readable, formats):
        if (item := real.get(os.path.realpath(path))) is not None:
            raise UsageError(f"{item.path}: {what} would replace an input. Choose another --output.")
    if "crops" in formats:
        crops = os.path.realpath(output / CROPS_FOLDER) + os.sep
        for place, item in real.items():
            if place.startswith(crops):
                raise UsageError(f"{item.path}: lies among the crops to be replaced. Choose another --output.")
    if "images" in formats and (output / PICTURES_FOLDER).exists():
        check_writable(output / PICTURES_FOLDER)
    for name in (name for kind in formats for name in FORMATS[kind] if not name.endswith("/")):
        if (output / name).is_dir():
            raise OutputError(
                f"{output / name}: not written (a folder of that name is there). Choose another --output."
            )


def _replaced(output: Path, readable: Sequence[Input], formats: Collection[str]) -> Iterator[tuple[Path, str]]:
    """The pictures that this run would write over, and what each is."""
    if "images" in formats and (output / PICTURES_FOLDER).exists():
        for item in readable:
            yield output / PICTURES_FOLDER / picture_name(item.name), "its annotated picture"
    if "sheet" in formats:
        yield output / SHEET_FILE, "the contact sheet"


def _check_places(output: Path, readable: Sequence[Input], formats: Collection[str]) -> None:
    """Raise UsageError where the files of two inputs would meet, naming the two."""
    for name_of in dict.fromkeys(_NAMES.get(kind, str) for kind in sorted(formats)):
        folded = {name_of(item.name).casefold() for item in readable}
        check_names_are_distinct(
            readable, output_name=name_of, ignore_case=len(folded) < len(readable) and ignores_case(output)
        )
