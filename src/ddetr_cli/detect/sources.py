"""What the user names (files, folders, patterns, lists, archives, videos, URLs) -> the inputs of a run.

Each real file comes once, in an order that never changes.
"""

from __future__ import annotations

import glob
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ddetr_cli.data.formats import ACCEPTED_SUFFIXES, ACCEPTED_TYPES, REFUSED_SUFFIXES
from ddetr_cli.detect.archives import ARCHIVE_SUFFIX, PACKED_SUFFIXES, Member, is_safe, members
from ddetr_cli.detect.remote import Remote, find_remote, is_url
from ddetr_cli.detect.video import VIDEO_SUFFIXES, Frame, Video
from ddetr_cli.errors import ImageError, NothingUsableError, UsageError

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
    origin: Member | Remote | Frame | None = None  # where its bytes are; without, at ``path``

    @property
    def where(self) -> str:
        """What messages call it."""
        return self.origin.url if isinstance(self.origin, Remote) else str(self.path)


@dataclass
class Inputs:
    """The pictures in processing order, and what was passed over, each with the reason."""

    images: list[Input] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def find_inputs(
    sources: Sequence[str],
    *,
    output: Path | None = None,
    recursive: bool = True,
    listed: Sequence[str] = (),
    every: int = 1,
    limit: int | None = None,
) -> Inputs:
    """Every picture among ``sources``, sorted by path, folder by folder.

    Sources are files, folders (searched to the bottom unless not ``recursive``), patterns (``'in/**/*.jpg'``), tar
    archives, videos (of which every ``every``-th frame is a picture) and URLs. ``listed`` are more of them, but no
    patterns, as a file lists them: one that is missing is an input that fails, and each one's name is its path as it
    stands there. Links to files are followed, links to folders inside a searched folder are not; a file reached twice
    counts once. Pictures below ``output`` written by an earlier run are not inputs. ``limit``: only the
    first so many.

    Raises UsageError for a source that does not exist and NothingUsableError when there is no picture at all.
    """
    found = Inputs()
    search = _Search(found, output, recursive=recursive, every=every)
    for source in sources:
        if not source:
            raise UsageError("source '': empty. Give a file or a folder.")
        if not search.add(source, PurePosixPath(source).name or source) and not search.add_pattern(source):
            raise UsageError(f"{source}: no such file or folder. Check the path.")
    for source in listed:
        if not search.add(source, _listed_name(source), folder_name=_listed_name(source)):
            found.images.append(Input(Path(source), _listed_name(source), "no such file. Check the path."))
    found.images.sort(key=lambda image: image.path.parts)
    _keep_each_file_once(found)
    found.images = found.images[:limit]
    found.skipped.sort(key=lambda entry: entry[0].parts)
    if not found.images:
        named = [*sources, *listed]
        where = ", ".join(named[:3]) + (", ..." if len(named) > 3 else "")
        raise NothingUsableError(f"{where or 'the list'}: no image found. Accepted types: {ACCEPTED_TYPES}.")
    return found


def parse_list(data: bytes, *, null: bool) -> list[str]:
    """The paths in a list: one a line, or with ``null`` one before each NUL, as ``find -print0`` writes them."""
    parts = data.split(b"\0") if null else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(part) for part in parts if part]


@dataclass
class _Search:
    """Adds what a source stands for to ``found``."""

    found: Inputs
    output: Path | None
    recursive: bool
    every: int

    def add(self, source: str, name: str, folder_name: str = "") -> bool:
        """Add a file, folder, archive, video or URL; False where there is none. ``name`` is that of a single one."""
        if is_url(source):
            for url, its_name in find_remote(source):
                self._add_remote(url, its_name, is_named=url == source)
            return True
        path = Path(source)
        if path.is_dir():
            _walk(path, self.found, self.output, recursive=self.recursive, within_name=folder_name)
        elif not os.path.lexists(path):
            return False
        elif path.name.lower().endswith(PACKED_SUFFIXES):
            failure = "compressed archive (it cannot be read from its middle). Unpack it, or make it a plain .tar."
            self.found.images.append(Input(path, name, failure))
        elif path.suffix.lower() == ARCHIVE_SUFFIX:
            self._add_archive(path, name)
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            self._add_video(path, name)
        else:
            self.found.images.append(_named_file(path, name))
        return True

    def add_pattern(self, source: str) -> bool:
        """Add what a pattern matches, named from its first wildcard's folder on; False where it is none."""
        if not glob.has_magic(source):
            return False
        fixed = Path(*_before_wildcard(Path(source)))
        matches = sorted(glob.glob(source, recursive=True))
        for match in matches:
            path = Path(match)
            if path.is_dir():
                continue  # 'in/**' gives folders too, and what is in them
            name = path.relative_to(fixed).as_posix()
            if path.suffix.lower() == ARCHIVE_SUFFIX or path.suffix.lower() in VIDEO_SUFFIXES:
                self.add(match, name)
            else:
                _sort_file(path, name, self.found)
        if not matches:
            raise UsageError(f"{source}: matches nothing. Check the pattern.")
        return True

    def _add_remote(self, url: str, name: str, *, is_named: bool) -> None:
        item = Input(Path(url), name, origin=Remote(url))
        if is_named or PurePosixPath(name).suffix.lower() in ACCEPTED_SUFFIXES:
            self.found.images.append(item)
        else:
            self.found.skipped.append((item.path, "not a picture by its name"))

    def _add_archive(self, archive: Path, name: str) -> None:
        try:
            for inner, member in members(archive):
                path = archive / inner.lstrip("/")
                suffix = PurePosixPath(inner).suffix.lower()
                if suffix not in ACCEPTED_SUFFIXES or PurePosixPath(inner).name.startswith("._"):
                    self.found.skipped.append((path, "not a picture by its name"))
                elif not is_safe(inner):
                    failure = "its name in the archive leads out of it. Rename it."
                    last = PurePosixPath(inner).name
                    self.found.images.append(Input(archive / last, f"{name}/{last}", failure))
                else:
                    inner = PurePosixPath(inner).as_posix()
                    self.found.images.append(Input(archive / inner, f"{name}/{inner}", origin=member))
        except (OSError, tarfile.TarError) as error:
            failure = f"damaged archive ({' '.join(str(error).split())}). Copy it again."
            self.found.images.append(Input(archive, name, failure))

    def _add_video(self, path: Path, name: str) -> None:
        video = Video(path, self.every)
        try:
            pictures = video.pictures
            if not pictures:
                raise ImageError(f"{path}: no frame in it. Copy it again.")
        except ImageError as error:
            self.found.images.append(Input(path, name, str(error).removeprefix(f"{path}: ")))
            return
        digits = max(6, len(str(pictures.stop)))
        for number in pictures:
            frame = f"{number:0{digits}d}"
            self.found.images.append(Input(path / frame, f"{name}/{frame}", origin=Frame(video, number)))


def _before_wildcard(pattern: Path) -> list[str]:
    parts = list(pattern.parts)
    magic = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return parts[:magic]


def _listed_name(source: str) -> str:
    """A listed path as a name below the output: as it stands there, without what leads out of a folder."""
    parts = [part for part in os.path.normpath(source).split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or source


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
    folders: dict[str, Input] = {}  # what is below each, one of it
    for key, image in owners.items():
        folder = key.rpartition("/")[0]
        while folder and folder not in folders:
            folders[folder] = image
            folder = folder.rpartition("/")[0]
    for folder, image in folders.items():
        if folder in owners:
            raise UsageError(
                f"{image.path}: its output needs a folder where the output of {owners[folder].path} stands. "
                "Run them apart."
            )


def _named_file(path: Path, name: str) -> Input:
    if not path.is_symlink():
        return Input(path, name)
    is_whole = path.exists()
    return Input(
        path, name, None if is_whole else "link to a missing file. Restore the file or remove the link.", True
    )


def _walk(folder: Path, found: Inputs, output: Path | None, *, recursive: bool, within_name: str = "") -> None:
    own_pictures = None if output is None else os.path.realpath(output / PICTURES_FOLDER)

    def note_unreadable(error: OSError) -> None:
        path = Path(error.filename)
        name = path.relative_to(folder).as_posix()
        found.images.append(Input(path, name, f"folder cannot be read ({error.strerror}). Check its permissions."))

    for current, folders, files in os.walk(folder, onerror=note_unreadable):
        here = Path(current)
        within = here.relative_to(folder).as_posix()
        prefix = "" if within == "." else within + "/"
        prefix = f"{within_name}/{prefix}" if within_name else prefix
        folders.sort()
        if not recursive:
            found.skipped += [(here / name, "folder (not searched with --no-recursive)") for name in folders]
            folders.clear()
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
    elif suffix == ARCHIVE_SUFFIX or suffix in VIDEO_SUFFIXES:
        found.skipped.append((path, "an archive or a video in a folder. Name it, or give a pattern"))
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
