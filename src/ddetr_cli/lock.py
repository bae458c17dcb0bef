"""One writer at a time in an output folder."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from ddetr_cli.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK_FILE = ".lock"

# A process forked from a writer must not hold its lock on after the writer was killed.
_held: set[IO[str]] = set()


def _let_go() -> None:
    for lock in _held:
        with suppress(OSError):
            lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def folder_lock(folder: Path, holder: str) -> Iterator[None]:
    """``folder``, made if need be, held against a second ``holder`` ("training", "run") for the block.

    The lock goes with its process, however that ends. Raises OutputError where another process holds it, with its
    pid, or the folder cannot be written.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _open_locked(path, folder, holder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}). Choose another --output.") from error
    with lock:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _held.add(lock)
        try:
            yield
        finally:
            # While it is held: whoever opened the same file meanwhile sees that it has no name any more.
            with suppress(OSError):
                path.unlink()
            _held.discard(lock)


def _open_locked(path: Path, folder: Path, holder: str) -> IO[str]:
    while True:
        lock = open(path, "a+")  # noqa: SIM115 held for the whole run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            pid = lock.read().strip() or "unknown"
            lock.close()
            raise OutputError(
                f"{folder}: locked by pid {pid}, another {holder} that is writing here. "
                "Wait for it, or choose another --output."
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()  # of a writer that has just finished
