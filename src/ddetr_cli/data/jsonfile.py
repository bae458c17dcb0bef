"""JSON files of other people: read whole with a sentence that says where one is broken, and their values checked."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddetr_cli.errors import DatasetError


def read_json(path: Path) -> Any:
    """The content of a UTF-8 JSON file, with or without a byte-order mark; NaN and Infinity pass as floats.

    Raises DatasetError naming the line and column, the encoding, or why the file cannot be read.
    """
    try:
        # Checked first: opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DatasetError(f"{path}: not a regular file (a folder, pipe, socket or device). Give a JSON file.")
        raw = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error
    if raw.startswith(b"version https://git-lfs"):
        raise DatasetError(f"{path}: not JSON (it is a Git LFS pointer). Run git lfs pull to fetch the real file.")
    if not raw.strip():
        raise DatasetError(f"{path}: line 1, column 1: not JSON (the file is empty). Copy or download it again.")
    text = _text(path, raw)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}). Copy or download it again."
        ) from error
    except RecursionError as error:
        raise DatasetError(f"{path}: line 1, column 1: nested too deeply to be a COCO file. Give another.") from error
    except ValueError as error:  # Python refuses integers of more than 4300 digits
        raise DatasetError(f"{path}: a number in it cannot be read ({error}). Correct the file.") from error


def _text(path: Path, raw: bytes) -> str:
    encoding = json.detect_encoding(raw)
    if encoding not in ("utf-8", "utf-8-sig"):
        raise DatasetError(f"{path}: encoded as {encoding.upper()}, not UTF-8. Save it as UTF-8.")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise DatasetError(
            f"{path}: line {line}, column {column}: byte 0x{raw[error.start]:02x} is not UTF-8 (perhaps Latin-1). "
            "Save it as UTF-8."
        ) from error


def plain_id(value: Any) -> int | str | None:
    """An id as it stands; a whole decimal (pandas writes 1.0) as its integer; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if type(value) is float:  # nearly every number of a big file
        return value if math.isfinite(value) else None
    if type(value) is not int:
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return number if math.isfinite(number) else None


def box(value: Any) -> tuple[float, float, float, float] | None:
    """Four finite numbers of a list of exactly four, or None."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    x, y, w, h = (number(item) for item in value)
    return None if x is None or y is None or w is None or h is None else (x, y, w, h)


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def short(value: Any) -> str:
    """A value as a message can show it, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def some(items: Sequence[str], limit: int = 5) -> str:
    """The first few of a list, for a message."""
    return ", ".join(items[:limit]) + (", ..." if len(items) > limit else "")
