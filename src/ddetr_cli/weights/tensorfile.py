"""Safetensors files, checked before they are read: the header must describe exactly the bytes that follow it.

The layout: 8 bytes little-endian N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}`` with an optional
``__metadata__`` of strings, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ddetr_cli.errors import CheckpointError

MAX_HEADER = 100_000_000  # the format's own limit
_ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def looks_like(head: bytes) -> bool:
    """Whether the first bytes of a file announce a JSON header, of whatever length."""
    return len(head) >= 9 and head[8:9] == b"{"


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Raises CheckpointError naming the first thing wrong with it."""
    metadata = _check(path)
    try:
        return metadata, safetensors.torch.load_file(path)
    except Exception as error:  # the header was checked: what is left is the disk, or a file changing under us
        raise CheckpointError(f"{path}: cannot be read ({error}). Copy or download it again.") from error


def _check(path: Path) -> dict[str, str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise _bad(path, f"its header claims {length} bytes, limit {MAX_HEADER}")
        if 8 + length > size:
            raise CheckpointError(
                f"{path}: truncated or damaged (header of {length} bytes in a file of {size} bytes). "
                "Copy or download it again."
            )
        raw = file.read(length)
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "__metadata__ is not a table of strings")
    spans = sorted((*_span(path, name, entry), name) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise _bad(path, f"tensor {name[:80]!r} {'overlaps another' if start < end else 'follows a hole'}")
        end = stop
    if 8 + length + end != size:
        what = "truncated or damaged" if 8 + length + end > size else "damaged"
        raise CheckpointError(
            f"{path}: {what} ({size} bytes where its header describes {8 + length + end}). Copy or download it again."
        )
    return metadata


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in table if names.count(name) > 1)
            raise _bad(path, f"{twice[:80]!r} is listed twice")
        return table

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a table")
    return header


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of one tensor, if its entry is consistent."""
    shown = repr(name[:80])
    if not isinstance(entry, dict):
        raise _bad(path, f"tensor {shown} has no entry")
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if dtype not in _ITEM_SIZE:
        raise _bad(path, f"tensor {shown} has dtype {str(dtype)[:20]!r}, not one of {', '.join(_ITEM_SIZE)}")
    if shape is None or offsets is None or len(offsets) != 2 or len(shape) > 8:
        raise _bad(path, f"tensor {shown} has an impossible shape or place")
    expected = math.prod(shape) * _ITEM_SIZE[dtype]
    if offsets[1] - offsets[0] != expected:
        raise _bad(path, f"tensor {shown} of {expected} bytes was given {offsets[1] - offsets[0]}")
    return offsets[0], offsets[1]


def _sizes(values: Any) -> list[int] | None:
    """``values`` if it is a list of sizes a file can have."""
    return values if isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values) else None


def _bad(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a sound safetensors file ({reason}). Copy or download it again.")
