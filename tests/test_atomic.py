from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ddetr_cli.atomic import (
    AtomicFile,
    check_new_folder,
    check_writable,
    ignores_case,
    remove_leftovers,
    write_atomically,
)
from ddetr_cli.errors import OutputError, UsageError


def test_a_file_has_its_name_only_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.json"
    file = AtomicFile(path)
    file.write(b"[")
    assert not path.exists()
    file.write(b"]")
    file.commit(durable=True)
    assert path.read_bytes() == b"[]"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_an_abandoned_file_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    file = AtomicFile(path)
    file.write(b"half")
    file.abandon()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_is_an_output_error_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OutputError) as caught:
        write_atomically(path, b"new", durable=True)
    assert str(caught.value).startswith(f"{path}: not written ({os.strerror(code)}).")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_save_that_reports_success_and_wrote_nothing_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(source: Path, target: Path) -> None:
        os.unlink(source)
        target.write_bytes(b"")

    monkeypatch.setattr(os, "replace", lose)
    with pytest.raises(OutputError, match="another number"):
        write_atomically(tmp_path / "a.json", b"new", durable=False)


def test_the_full_device_is_an_output_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OutputError):
        AtomicFile(Path("/dev/full/a.json"))


def test_an_interrupt_while_writing_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.json", b"new", durable=False)
    assert list(tmp_path.iterdir()) == []


def test_checking_a_folder_leaves_no_trace_of_it(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    check_writable(tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_an_output_folder_is_new_or_overwritten_and_never_a_file(tmp_path: Path) -> None:
    check_new_folder(tmp_path / "new", overwrite=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OutputError, match=r"exists already\. Choose another --output, or pass --overwrite"):
        check_new_folder(tmp_path, overwrite=False)
    check_new_folder(tmp_path, overwrite=True)
    (tmp_path / "file").write_bytes(b"")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="--output takes a folder"):
            check_new_folder(tmp_path / "file", overwrite=overwrite)


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(OutputError, match="not written"):
        check_writable(tmp_path / "a" / "b")


def test_a_read_only_folder_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions mean nothing to root")
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "a")


def test_case_is_told_apart_where_two_such_files_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert ignores_case(tmp_path / "new") == (tmp_path / "A").exists()


def test_only_our_own_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in (".ddetr-12-3.tmp", "sub/.ddetr-1-0.tmp", ".ddetr-x.tmp", "notes.tmp", ".ddetr-1-1.tmp.jpg"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".ddetr-1-1.tmp.jpg", ".ddetr-x.tmp", "notes.tmp"]
