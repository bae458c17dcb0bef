from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ddetr_cli.errors import OutputError
from ddetr_cli.lock import LOCK_FILE, folder_lock

if TYPE_CHECKING:
    from pathlib import Path

HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from ddetr_cli.lock import folder_lock\n"
    "with folder_lock(Path(sys.argv[1]), 'run'):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


def test_a_second_writer_is_refused_with_the_pid_of_the_first_and_one_that_was_killed_does_not_count(
    tmp_path: Path,
) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(OutputError, match=f"locked by pid {process.pid}, another run that is writing here"),
            folder_lock(tmp_path, "run"),
        ):
            pytest.fail("the lock was given twice")
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    with folder_lock(tmp_path, "run"):
        assert (tmp_path / LOCK_FILE).read_text() == str(os.getpid())


def test_a_lock_leaves_no_file_behind(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "made/here", "run"):
        assert (tmp_path / "made/here" / LOCK_FILE).exists()
    assert list((tmp_path / "made/here").iterdir()) == []


def test_a_lock_on_a_file_that_has_just_lost_its_name_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    calls = []

    def unlink_first(lock: int, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()  # as a writer that ends between our open and our lock
        calls.append(operation)
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", unlink_first)
    with folder_lock(tmp_path, "run"):
        assert (tmp_path / LOCK_FILE).exists()
    assert len(calls) == 2
