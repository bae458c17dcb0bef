from __future__ import annotations

from pathlib import Path

import pytest

from ddetr_cli.detect.session import check_resumable, own_folder
from ddetr_cli.errors import OutputError


def test_what_a_killed_run_left_half_written_is_swept_up_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "annotated").mkdir()
    for name in ("annotated/.ddetr-99-1.tmp", ".ddetr-99-0.tmp", "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with own_folder(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["annotated", "mine.tmp"]


def test_a_folder_made_for_a_run_that_wrote_nothing_goes_again_and_one_that_was_there_stays(tmp_path: Path) -> None:
    with own_folder(tmp_path / "a/b"):
        assert (tmp_path / "a/b/.lock").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with own_folder(tmp_path / "there/b"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_folder_with_something_but_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    check_resumable(tmp_path / "absent")
    (tmp_path / ".lock").touch()
    (tmp_path / ".ddetr-1-0.tmp").touch()
    check_resumable(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputError, match="holds no run to resume"):
        check_resumable(tmp_path)
    (tmp_path / "journal.jsonl").touch()
    check_resumable(tmp_path)
