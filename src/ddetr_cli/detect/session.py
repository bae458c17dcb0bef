"""The output folder of a run: whose it is, and where an earlier run left off."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ddetr_cli.atomic import is_leftover, output_error, remove_leftovers
from ddetr_cli.detect.journal import JOURNAL_FILE, Journal, RunHeader
from ddetr_cli.detect.manifest import RUNNING, read_manifest
from ddetr_cli.errors import OutputError
from ddetr_cli.lock import LOCK_FILE, folder_lock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_JOURNALS = "journal*.jsonl"


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """``folder`` made and locked against a second run for the block; what a killed one left half-written is removed.

    A folder made here that is empty at the end is removed too. Raises OutputError.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with folder_lock(folder, "run"):
            remove_leftovers(folder)
            yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def check_resumable(folder: Path) -> None:
    """Raise OutputError for a folder that holds something and no run to go on with; one without anything is fine."""
    with suppress(OSError):  # one that cannot be read cannot be written either, and is refused for that
        names = {path.name for path in folder.iterdir()}
        if not journals_in(folder) and any(name != LOCK_FILE and not is_leftover(name) for name in names):
            raise OutputError(
                f"{folder}: holds no run to resume ({JOURNAL_FILE} is missing). "
                "Choose another --output, or start anew with --overwrite."
            )


def journals_in(folder: Path) -> list[Path]:
    """The journals of the run in ``folder``: of one process, or one for each of several."""
    return sorted(folder.glob(_JOURNALS))


def open_journal(
    folder: Path, header: RunHeader, *, resume: bool, skip_failed: bool, process: tuple[int, int] = (1, 1)
) -> Journal:
    """The journal of a run in its own ``folder``: a new one, or with ``resume`` one that goes on with an earlier run.

    ``process`` (i, n): that of the i-th of n processes. Raises UsageError for an earlier run of other options or
    inputs, and OutputError.
    """
    path = folder / (JOURNAL_FILE if process[1] == 1 else "journal-{}-of-{}.jsonl".format(*process))
    earlier = [other for other in journals_in(folder) if other != path]
    if not resume:
        return Journal.begin(path, header)
    died = read_manifest(folder).get("state") == RUNNING
    return Journal.go_on([*earlier, path], header, skip_failed=skip_failed, died=died)


def remove_journals(folder: Path) -> None:
    """Forget the earlier run in ``folder``. Raises OutputError."""
    for path in journals_in(folder):
        try:
            path.unlink()
        except OSError as error:
            raise output_error(path, error) from error
