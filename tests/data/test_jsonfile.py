from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddetr_cli.data.jsonfile import box, number, plain_id, read_json, some
from ddetr_cli.errors import DatasetError


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "line 1, column 1: not JSON (the file is empty)"),
        (b'{"images": [\n  1,\n  2 3]}', "line 3, column 5: not JSON"),
        (b'{"images": [1, 2', "line 1, column 17: not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        ("{}".encode("utf-16"), "encoded as UTF-16"),
        ("{}".encode("utf-32-le"), "encoded as UTF-32-LE"),
        (b'{\n"name": "caf\xe9"}', "line 2, column 13: byte 0xe9 is not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"[" + b"9" * 5000 + b"]", "a number in it cannot be read"),
    ],
)
def test_what_is_not_json_is_refused_with_the_place(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        read_json(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert expected in str(caught.value)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(b'\xef\xbb\xbf{"name": "\xc3\xa9"}')
    assert read_json(file) == {"name": "é"}


def test_a_pipe_and_a_missing_file_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DatasetError, match="not a regular file"):
        read_json(tmp_path / "pipe.json")
    with pytest.raises(DatasetError, match="cannot be read"):
        read_json(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1), ("a", "a"), (2**60, 2**60), (1.0, 1), (1.5, None), (True, None), (None, None), ([], None)],
)
def test_ids_are_integers_strings_or_whole_decimals(value: object, expected: object) -> None:
    assert plain_id(value) == expected
    assert type(plain_id(value)) is type(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", None, 10**400, [1]])
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert number(value) is None
    assert box([0, 0, 1, value]) is None


@pytest.mark.parametrize("value", [None, [], [1, 2, 3], [1, 2, 3, 4, 5], {"x": 1}, "1234"])
def test_a_box_is_a_list_of_exactly_four(value: object) -> None:
    assert box(value) is None
    assert box([1, 2.5, 3, 4]) == (1.0, 2.5, 3.0, 4.0)


def test_long_lists_are_shortened_for_messages() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdefg")) == "a, b, c, d, e, ..."
