from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ddetr_cli.errors import CheckpointError
from ddetr_cli.weights.reader import read_file
from ddetr_cli.weights.tensorfile import MAX_HEADER


def _file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _entry(start: int, stop: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


GOOD = {"a": _entry(0, 8), "b": _entry(8, 16)}


def test_a_sound_file_is_read_with_its_metadata(tmp_path: Path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.zeros(0, 2), "d": torch.ones(2).bfloat16()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"who": "me"})
    stored = read_file(tmp_path / "x.safetensors")
    assert stored.metadata == {"who": "me"}
    assert stored.tensors.keys() == tensors.keys()
    assert all(torch.equal(stored.tensors[name], tensor) for name, tensor in tensors.items())


def test_a_file_made_by_hand_is_sound(tmp_path: Path):
    stored = read_file(_file(tmp_path / "x", GOOD, bytes(16)))
    assert stored.tensors["b"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": _entry(0, 8), "b": _entry(12, 20)}, bytes(20), "'b' follows a hole"),
        ({"a": _entry(4, 12)}, bytes(12), "'a' follows a hole"),
        ({"a": _entry(0, 8), "b": _entry(4, 12)}, bytes(12), "'b' overlaps another"),
        ({"a": _entry(0, 8, dtype="F8_E4M3")}, bytes(8), "'a' has dtype 'F8_E4M3'"),
        ({"a": _entry(0, 8, dtype="\x1b[31m")}, bytes(8), "has dtype"),
        ({"a": _entry(0, 8, shape=[3])}, bytes(8), "'a' of 12 bytes was given 8"),
        ({"a": _entry(0, 8, shape=[-2])}, bytes(8), "impossible shape"),
        ({"a": _entry(0, 8, shape=[2.0])}, bytes(8), "impossible shape"),
        ({"a": _entry(0, 8, shape=[1 << 60, 1 << 60])}, bytes(8), "impossible shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8), "was given -8"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8), "impossible shape or place"),
        ({"a": 3}, b"", "'a' has no entry"),
        ({"__metadata__": {"k": 3}, **GOOD}, bytes(16), "__metadata__"),
        ([1, 2], b"", "not a checkpoint"),
        (b'{"a": ' + json.dumps(_entry(0, 8)).encode() + b', "a": ' + json.dumps(_entry(0, 8)).encode() + b"}",
         bytes(8), "'a' is listed twice"),
        (b'{"a": nonsense}', b"", "its header is not JSON"),
        (b'{"a": ' + b"[" * 100_000, b"", "its header is not JSON"),
        (b'{"\xff": 1}', b"", "its header is not JSON"),
        (GOOD, bytes(15), "truncated or damaged"),
        (GOOD, bytes(17), "damaged"),
    ],
)  # fmt: skip
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path: Path, header: Any, data: bytes, reason: str):
    path = _file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(f"{path}: ") and "\n" not in message and "\x1b" not in message


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 1 << 63, 1000])
def test_a_header_longer_than_allowed_or_than_the_file_is_refused(tmp_path: Path, length: int):
    path = _file(tmp_path / "long.safetensors", b'{"a"', length=length)
    with pytest.raises(CheckpointError, match="limit 100000000" if length > MAX_HEADER else "truncated or damaged"):
        read_file(path)


@pytest.mark.parametrize("percent", [1, 50, 90, 99])
def test_a_truncated_file_is_called_truncated(tmp_path: Path, percent: int):
    path = tmp_path / "cut.safetensors"
    safetensors.torch.save_file({"a": torch.randn(64, 64)}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * percent // 100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_file(path)
