from __future__ import annotations

from pathlib import Path

import pytest

from ddetr_cli.data.textfile import read_utf8
from ddetr_cli.errors import DatasetError


def test_a_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\n")
    assert read_utf8(tmp_path / "a.txt", "text") == "café\n"


def test_a_file_past_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 11)
    with pytest.raises(DatasetError, match=r"too large \(11 bytes\)"):
        read_utf8(tmp_path / "a.txt", "text", max_bytes=10)
    assert len(read_utf8(tmp_path / "a.txt", "text", max_bytes=11)) == 11


def test_the_kind_of_file_is_in_the_message(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DatasetError, match=r"not XML .*git lfs pull"):
        read_utf8(tmp_path / "a.xml", "XML")
