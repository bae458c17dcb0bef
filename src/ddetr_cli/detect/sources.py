"""Files and folders the user names -> the inputs of a run, each real file once, in an order that never changes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ddetr_cli.data.formats import ACCEPTED_SUFFIXES, ACCEPTED_TYPES, REFUSED_SUFFIXES
from ddetr_cli.errors import NothingUsableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

# Pictures that a run writes; they are no inputs.
PICTURES_FOLDER, CROPS_FOLDER = "annotated", "crops"
SHEET_FILE = "sheet.jpg"
# A folder holding all of these is an earlier run's output.
RESULT_FILES = ("detections.json", "images.json")


@dataclass(frozen=True)
class Input:
    """One picture to process. ``name`` is its path within its source, '/' between folders; the outputs mirror it."""

    path: Path
    name: str
    failure: str | None = None  # why it cannot even be tried
    is_link: bool = False


@dataclass
class Inputs:
    """The pictures in processing order, and what was passed over, each with the reason."""

    images: list[Input] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def find_inputs(sources: Sequence[str], *, output: Path | None = None) -> Inputs:
    """Every picture among ``sources`` (files, and folders searched recursively), sorted by path, folder by folder.

    Links to files are followed, links to folders inside a searched folder are not; a file reached twice counts
    once. Pictures below ``output`` written by an earlier run are not inputs. Raises UsageError for a source that
    does not exist and NothingUsableError when there is no picture at all.
    """
    found = Inputs()
    for source in sources:
        if not source:
            raise UsageError("source '': empty. Give a file or a folder.")
        if source == "-":
            raise UsageError(
                "source '-': reading from stdin is not supported. Give a file (./- if it has that name)."
            )
        path = Path(source)
        if path.is_dir():
            _walk(path, found, output)
        elif os.path.lexists(path):
            found.images.append(_named_file(path, path.name))
        else:
            raise UsageError(f"{source}: no such file or folder. Check the path.")
    found.images.sort(key=lambda image: image.path.parts)
    _keep_each_file_once(found)
    found.skipped.sort(key=lambda entry: entry[0].parts)
    if not found.images:
        where = ", ".join(sources[:3]) + (", ..." if len(sources) > 3 else "")
        raise NothingUsableError(f"{where}: no image found. Accepted types: {ACCEPTED_TYPES}.")
    return found


def check_names_are_distinct(
    images: Iterable[Input], *, output_name: Callable[[str], str], ignore_case: bool
) -> None:
    """Raise UsageError when the outputs of two inputs would meet in one file, naming the two."""
    owners: dict[str, Input] = {}
    for image in images:
        name = output_name(image.name)
        other = owners.setdefault(name.casefold() if ignore_case else name, image)
        if other is not image:
            raise UsageError(
                f"{image.path}: its output {name} is also that of {other.path}. "
                "Run them apart, or name the folder that holds both."
            )
    for key, image in owners.items():
        for parent in PurePosixPath(key).parents:
            if str(parent) in owners:
                raise UsageError(
                    f"{image.path}: its output needs a folder where the output of {owners[str(parent)].path} stands. "
                    "Run them apart."
                )


def _named_file(path: Path, name: str) -> Input:
    if not path.is_symlink():
        return Input(path, name)
    is_whole = path.exists()
    return Input(
        path, name, None if is_whole else "link to a missing file. Restore the file or remove the link.", True
    )


def _walk(folder: Path, found: Inputs, output: Path | None) -> None:
    own_pictures = None if output is None else os.path.realpath(output / PICTURES_FOLDER)

    def note_unreadable(error: OSError) -> None:
        path = Path(error.filename)
        name = path.relative_to(folder).as_posix()
        found.images.append(Input(path, name, f"folder cannot be read ({error.strerror}). Check its permissions."))

    for current, folders, files in os.walk(folder, onerror=note_unreadable):
        here = Path(current)
        within = here.relative_to(folder).as_posix()
        prefix = "" if within == "." else within + "/"
        folders.sort()
        has_results = all(name in files for name in RESULT_FILES)
        for name in list(folders):
            if (here / name).is_symlink():
                folders.remove(name)
                found.skipped.append((here / name, "link to a folder, not followed"))
            elif (name in (PICTURES_FOLDER, CROPS_FOLDER) and has_results) or (
                name == PICTURES_FOLDER and own_pictures == os.path.realpath(here / name)
            ):
                folders.remove(name)
                found.skipped.append((here / name, "output of ddetr"))
        for name in files:
            if name == SHEET_FILE and has_results:
                found.skipped.append((here / name, "output of ddetr"))
            else:
                _sort_file(here / name, prefix + name, found)


def _sort_file(path: Path, name: str, found: Inputs) -> None:
    suffix = path.suffix.lower()
    if path.name.startswith(("._", ".ddetr-")):
        found.skipped.append((path, "not a picture (a system file)"))
    elif suffix in ACCEPTED_SUFFIXES:
        found.images.append(_named_file(path, name))
    elif suffix in REFUSED_SUFFIXES:
        failure = f"format not accepted ({suffix[1:]}). Convert it to one of {ACCEPTED_TYPES}."
        found.images.append(Input(path, name, failure))
    else:
        found.skipped.append((path, "not a picture by its name"))


def _keep_each_file_once(found: Inputs) -> None:
    """Move names that lead to a file already among the inputs to ``skipped``; a link yields to the file itself."""
    real_paths = list(_real_paths(found.images))
    owners: dict[str, Input] = {}
    for is_link_turn in (False, True):
        for image, real in zip(found.images, real_paths, strict=True):
            if image.is_link == is_link_turn:
                owners.setdefault(real, image)
    kept = []
    for image, real in zip(found.images, real_paths, strict=True):
        if owners[real] is image:
            kept.append(image)
        else:
            found.skipped.append((image.path, f"the same file as {owners[real].path}"))
    found.images = kept


def _real_paths(images: Iterable[Input]) -> Iterator[str]:
    """Where each input really lies; each folder is resolved once, which keeps 100 000 files quick."""
    folders: dict[str, str] = {}
    for image in images:
        path = str(image.path)
        if image.is_link:
            yield os.path.realpath(path)
            continue
        parent, name = os.path.split(path)
        if parent not in folders:
            folders[parent] = os.path.realpath(parent or ".")
        yield f"{folders[parent]}/{name}"
