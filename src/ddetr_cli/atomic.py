"""Files that appear under their final name only when complete: written beside it, then renamed over it."""

from __future__ import annotations

import itertools
import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ddetr_cli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


# Short, because the final name may already be as long as the file system allows.
_TEMPORARY = re.compile(r"\.ddetr-\d+-\d+\.tmp")
_counter = itertools.count()


def output_error(path: Path, error: OSError) -> OutputError:
    """The refusal for ``path``, with what the system says."""
    return OutputError(f"{path}: not written ({error.strerror or error}). Free space or choose another place.")


class AtomicFile:
    """A file written under a temporary name beside ``path``; ``commit`` gives it its name, ``abandon`` removes it.

    Raises OutputError wherever the system refuses; the file at ``path`` is then untouched.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".ddetr-{os.getpid()}-{next(_counter)}.tmp")
        with _refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.stream: BinaryIO = self._temporary.open("xb")

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        try:
            with _refusals(self.path):
                self.stream.write(data)
        except OutputError:
            self.abandon()
            raise

    def commit(self, *, durable: bool) -> None:
        """Give the file its final name; ``durable`` waits for the disk first, and a power cut leaves old or new."""
        try:
            with _refusals(self.path):
                size = self.stream.tell()
                self.stream.flush()
                if durable:
                    os.fsync(self.stream.fileno())
                self.stream.close()
                self._temporary.replace(self.path)
                # A save that reports success and wrote nothing has been seen in the wild.
                if self.path.stat().st_size != size:
                    raise OSError(f"{size} bytes were written, but the file holds another number")
        except OutputError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Remove the temporary file, whatever state it is in."""
        with suppress(OSError):
            self.stream.close()
        with suppress(OSError):
            self._temporary.unlink()


def write_atomically(path: Path, data: bytes, *, durable: bool) -> None:
    """``data`` at ``path``, all of it or nothing; ``durable`` as in ``AtomicFile.commit``. Raises OutputError."""
    file = AtomicFile(path)
    try:
        file.write(data)
        file.commit(durable=durable)
    except BaseException:
        file.abandon()
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary stream that becomes ``path`` when the block ends well, and vanishes otherwise. Raises OutputError."""
    file = AtomicFile(path)
    try:
        with _refusals(path):
            yield file.stream
        file.commit(durable=True)
    except BaseException:
        file.abandon()
        raise


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON at ``path``; NaN and Infinity, which JSON has not, raise ValueError."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode(), durable=True)


def check_new_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise unless ``folder`` can be a command's output: absent or, with ``overwrite``, a folder; and writable.

    UsageError for a file, OutputError for the rest; leaves nothing behind.
    """
    with _refusals(folder):  # a folder on the way that may not be searched
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder}: a file (--output takes a folder). Choose another name.")
        if folder.exists() and not overwrite:
            raise OutputError(f"{folder}: exists already. Choose another --output, or pass --overwrite.")
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Raise OutputError unless files can be made in ``folder``, which need not exist; leaves nothing behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
        probe = AtomicFile(folder / "probe")
        probe.abandon()
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def ignores_case(folder: Path) -> bool:
    """Whether ``folder``'s file system takes ``A`` and ``a`` for one name."""
    while not folder.exists():
        folder = folder.parent
    lower = folder / f".ddetr-{os.getpid()}-{next(_counter)}.tmp"
    upper = lower.with_name(lower.name.upper())
    with _refusals(folder):
        lower.touch(exist_ok=False)
        try:
            return upper.exists()
        finally:
            lower.unlink()


def is_leftover(name: str) -> bool:
    """Whether a file of this name is the temporary one of a run, perhaps killed."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed run left below ``folder``."""
    for current, _, files in os.walk(folder):
        for name in files:
            if is_leftover(name):
                with suppress(OSError):
                    Path(current, name).unlink()


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error
