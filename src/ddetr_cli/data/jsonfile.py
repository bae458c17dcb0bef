"""JSON files of other people: read whole with a sentence that says where one is broken, and their values checked."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddetr_cli.data.textfile import read_utf8
from ddetr_cli.errors import DatasetError


def read_json(
    path: Path, *, without: str | None = None, replace: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """The content of a UTF-8 JSON file, with or without a byte-order mark; NaN and Infinity pass as floats.

    The key ``without`` is left out of every object as it is read: the polygons of COCO's train2017 would take 2 GB.
    Where ``replace`` is given, what it makes of each object as it is read takes that object's place.
    Raises DatasetError naming the line and column, the encoding, or why the file cannot be read.
    """
    text = read_utf8(path, "JSON")
    if not text.strip():
        raise DatasetError(f"{path}: line 1, column 1: not JSON (the file is empty). Copy or download it again.")

    def lean(entry: dict[str, Any]) -> dict[str, Any]:
        entry.pop(without, None)  # type: ignore[arg-type]
        return entry

    try:
        with collector_paused():
            return json.loads(text, object_hook=replace or (None if without is None else lean))
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}). Copy or download it again."
        ) from error
    except RecursionError as error:
        raise DatasetError(f"{path}: line 1, column 1: nested too deeply to be a COCO file. Give another.") from error
    except ValueError as error:  # Python refuses integers of more than 4300 digits
        raise DatasetError(f"{path}: a number in it cannot be read ({error}). Correct the file.") from error


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for reference cycles in the block: among millions of new objects it takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def plain_id(value: Any) -> int | str | None:
    """An id as it stands; a whole decimal (pandas writes 1.0) as its integer; None for anything else."""
    if type(value) is int:
        return value
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
    x, y, w, h = value
    # Nearly every box of a big file; a sum is finite only where its parts are.
    if type(x) is type(y) is type(w) is type(h) is float and math.isfinite(x + y + w + h):
        return x, y, w, h
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
