"""What a run has finished, on disk, so that one that broke off can go on and end with the same bytes.

``journal.jsonl`` begins with a line on the run: its options, classes and inputs. Then comes a line for each finished
image, written when every sink has it. A line stands in the file whole or not at all: one that a kill cut short is cut
off. Nothing in it tells the time, so equal runs write equal journals.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ddetr_cli.atomic import output_error, write_atomically
from ddetr_cli.detect.archives import Member
from ddetr_cli.detect.remote import Remote
from ddetr_cli.detect.results import ImageResult
from ddetr_cli.detect.sources import Input
from ddetr_cli.detect.video import Frame, Video
from ddetr_cli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ddetr_cli.classes import ClassTable

JOURNAL_FILE = "journal.jsonl"
_FORMAT = 1
_RESULT = re.compile(rb'\{"position": (\d+), "failed": (true|false), .*\}')
_TRYING = re.compile(rb'\{"trying": (\d+)\}')


def stretch(positions: range, part: int, parts: int) -> range:
    """The ``part``-th of ``parts`` stretches, as equal as can be, of a range of step 1."""
    ends = [positions.start + len(positions) * n // parts for n in (part - 1, part)]
    return range(*ends)


@dataclasses.dataclass(frozen=True)
class RunHeader:
    """What decides a run's results; two runs of equal headers give equal files.

    ``options`` by name; ``info`` is what images.json tells of the run. ``names_sha256`` is of the ``images`` names of
    all inputs, in their order. ``shard`` (i, n): the i-th of n parts.
    """

    options: dict[str, Any]
    info: dict[str, Any]
    classes: list[list[Any]]
    formats: list[str]
    images: int
    names_sha256: str
    shard: tuple[int, int] = (1, 1)

    @classmethod
    def of(
        cls,
        inputs: Sequence[Input],
        classes: ClassTable,
        *,
        info: dict[str, Any],
        options: dict[str, Any],
        formats: Sequence[str],
        shard: tuple[int, int] = (1, 1),
    ) -> RunHeader:
        """The header of a run over ``inputs``."""
        sha = hashlib.sha256()
        for item in inputs:
            sha.update(os.fsencode(item.name) + b"\0")
        return cls(options, info, classes.to_json(), sorted(formats), len(inputs), sha.hexdigest(), shard)

    @property
    def positions(self) -> range:
        """The inputs that are this run's: all, or the i-th of n equal stretches of them."""
        return stretch(range(self.images), *self.shard)

    def differences(self, now: RunHeader) -> list[str]:
        """In what ``now`` differs, in words: ``threshold 0.5, not 0.3``."""
        before, after = (
            {**h.options, "format": ",".join(h.formats), "shard": "{}/{}".format(*h.shard)} for h in (self, now)
        )
        found = [
            f"{name} {_word(before.get(name))}, not {_word(after.get(name))}"
            for name in {**before, **after}
            if before.get(name) != after.get(name)
        ]
        if self.classes != now.classes:
            found.append("other classes")
        if self.images != now.images:
            found.append(f"{self.images} inputs, not {now.images}")
        elif self.names_sha256 != now.names_sha256:
            found.append("inputs of other names, or in another order")
        return found

    def to_line(self) -> bytes:
        """The first line of a journal."""
        return _line({"journal": _FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_line(cls, line: bytes) -> RunHeader:
        """The inverse. Raises ValueError, TypeError or KeyError for anything else."""
        values = json.loads(line)
        if values.pop("journal") != _FORMAT:
            raise ValueError("written by another version of ddetr")
        return cls(**{**values, "shard": tuple(values["shard"])})


class Finished:
    """The finished images of one journal, or of several that together are one run's, by position among the inputs.

    Where an image has several lines the last counts. ``culprits`` are the images that a process was at, alone, when
    it died, twice: once may be chance. Raises OutputError for a file that is no journal.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.headers: list[RunHeader] = []
        self.culprits: set[int] = set()
        self._trying: int | None = None
        self.length = 0  # of what is whole of the last file
        self._paths = list(paths)
        self._places: dict[int, tuple[int, int]] = {}
        self._failed: set[int] = set()
        self._videos: dict[str, Video] = {}
        for number in range(len(self._paths)):
            self._scan(number)

    def __contains__(self, position: int) -> bool:
        return position in self._places

    def __len__(self) -> int:
        return len(self._places)

    def forget_failures(self) -> None:
        """Have the failed ones tried again."""
        for position in self._failed:
            self._places.pop(position, None)

    def read(self, position: int, item: Input | None = None) -> ImageResult:
        """The result of one, of ``item`` or else of an input by the path and name it had."""
        try:
            row = json.loads(self.line(position))
            return result_from(row, item or input_from(row, self._videos))
        except (ValueError, KeyError, TypeError) as error:
            path = self._paths[self._places[position][0]]
            raise OutputError(f"{path}: damaged ({error}). Start anew with --overwrite.") from error

    def line(self, position: int) -> bytes:
        """The line of one."""
        number, offset = self._places[position]
        try:
            with self._paths[number].open("rb") as file:
                file.seek(offset)
                return file.readline()
        except OSError as error:
            raise OutputError(f"{self._paths[number]}: cannot be read ({error.strerror}). Check it.") from error

    def _scan(self, number: int) -> None:
        path = self._paths[number]
        self._trying = None
        try:
            with path.open("rb") as file:
                first = file.readline()
                if not first.endswith(b"\n"):
                    raise ValueError("its first line is cut off")
                self.headers.append(RunHeader.from_line(first))
                self.length = len(first)
                for line in file:
                    if not self._take(line, number):
                        break
                    self.length += len(line)
        except OSError as error:
            raise OutputError(f"{path}: cannot be read ({error.strerror}). Check it.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path}: not a journal of ours ({error}). Start anew with --overwrite.") from error

    def _take(self, line: bytes, number: int) -> bool:
        whole = line.removesuffix(b"\n")
        if len(whole) == len(line):
            return False
        if match := _TRYING.fullmatch(whole):
            if self._trying == int(match[1]):
                self.culprits.add(self._trying)
            self._trying = int(match[1])
            return True
        match = _RESULT.fullmatch(whole)
        if match is None:
            return False
        position = int(match[1])
        self._places[position] = (number, self.length)
        self._failed.discard(position)
        if match[2] == b"true":
            self._failed.add(position)
        self._trying = None
        self.culprits.discard(position)
        return True


class Journal:
    """A journal that is being written, and what was finished before. ``add`` raises OutputError."""

    def __init__(self, path: Path, finished: Finished, *, suspects: bool = False) -> None:
        self.finished = finished
        self.has_suspects = suspects  # what was in work when the last process died is tried one by one
        self._path = path
        try:
            # Unbuffered: a line is in the system's hands when write returns, and survives a kill.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise output_error(path, error) from error

    @classmethod
    def begin(cls, path: Path, header: RunHeader) -> Self:
        """A new one, in place of any other."""
        write_atomically(path, header.to_line(), durable=True)
        return cls(path, Finished([]))

    @classmethod
    def go_on(
        cls, paths: Sequence[Path], header: RunHeader, *, skip_failed: bool = False, died: bool = False
    ) -> Self:
        """One that goes on with a run of the same header, writing into the last of its journals ``paths``.

        That one need not be there. Without ``skip_failed`` the failures are tried again. Raises UsageError for a run
        that differs, naming the difference.
        """
        path = paths[-1]
        finished = Finished(paths if path.exists() else paths[:-1])
        for differences in (before.differences(header) for before in finished.headers):
            if differences:
                raise UsageError(
                    f"--resume: {path.parent} was started with {'; '.join(differences)}. "
                    "Run as then, or start anew with --overwrite."
                )
        if not skip_failed:
            finished.forget_failures()
        if not path.exists():
            write_atomically(path, header.to_line(), durable=True)
        else:
            try:
                os.truncate(path, finished.length)
            except OSError as error:
                raise output_error(path, error) from error
        return cls(path, finished, suspects=skip_failed and died)

    def add(self, position: int, result: ImageResult) -> None:
        """Note one finished image."""
        self._write(result_line(position, result))

    def note_trying(self, position: int) -> None:
        """Note the image that is tried alone from now on."""
        self._write(_line({"trying": position}))

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._file.close()

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise output_error(self._path, error) from error


def result_line(position: int, result: ImageResult) -> bytes:
    """One line of JSON from which ``result_from`` makes the same result; left out is how the run went."""
    row: dict[str, Any] = {"position": position, "failed": result.failure is not None}
    row |= {"path": str(result.input.path), "name": result.input.name}
    if result.input.origin is not None:
        row["origin"] = _origin_row(result.input.origin)
    left_out = ("input", "seconds", "is_reached")
    row |= {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in left_out}
    return _line(row)


def result_from(row: dict[str, Any], item: Input | None = None) -> ImageResult:
    """The result in a row of a journal, of ``item`` or else of the input that is noted there."""
    values = {f.name: row[f.name] for f in dataclasses.fields(ImageResult) if f.name in row}
    values["input"] = item or input_from(row, {})
    values["boxes_xyxy_px"] = [tuple(box) for box in row["boxes_xyxy_px"]]
    values["size_wh"] = None if row["size_wh"] is None else tuple(row["size_wh"])
    return ImageResult(**values)


def input_from(row: dict[str, Any], videos: dict[str, Video]) -> Input:
    """The input in a row of a journal; frames of one file share one of ``videos``, which grow."""
    origin: Member | Remote | Frame | None = None
    match row.get("origin"):  # absent for a file that is the picture
        case ["tar", archive, offset, size]:
            origin = Member(Path(archive), offset, size)
        case ["url", url]:
            origin = Remote(url)
        case ["frame", path, number]:
            origin = Frame(videos.setdefault(path, Video(Path(path))), number)
    return Input(Path(row["path"]), row["name"], origin=origin)


def _origin_row(origin: Member | Remote | Frame) -> list[str | int]:
    match origin:
        case Member(archive, offset, size):
            return ["tar", str(archive), offset, size]
        case Remote(url):
            return ["url", url]
        case Frame(video, number):
            return ["frame", str(video.path), number]


def _line(value: dict[str, Any]) -> bytes:
    # ASCII, so that a file name that is not UTF-8 comes back; floats as repr gives them, which is exact.
    return json.dumps(value, allow_nan=False, ensure_ascii=True).encode("ascii") + b"\n"


def _word(value: object) -> str:
    return "none" if value is None else str(value)
