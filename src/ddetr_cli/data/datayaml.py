"""data.yaml, which describes a data set in YOLO's layout: the names of its classes and where its pictures are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddetr_cli.data.jsonfile import kind
from ddetr_cli.data.textfile import read_utf8
from ddetr_cli.errors import DatasetError

_SPLITS = ("train", "val", "valid", "test")
_MAX_BYTES = 1 << 20  # a data.yaml with 100 000 names has about this size


@dataclass(frozen=True)
class DataYaml:
    """``names`` by class index; ``splits``: split name -> folder of pictures, or text file that lists them."""

    names: dict[int, str]
    splits: dict[str, Path]


def read_data_yaml(path: Path) -> DataYaml:
    """The content of a data.yaml. Raises DatasetError where it says nothing usable."""
    import yaml

    text = read_utf8(path, "YAML", max_bytes=_MAX_BYTES)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        why = getattr(error, "problem", None) or type(error).__name__
        raise DatasetError(f"{path}: {where}not YAML ({why}). Correct the file.") from error
    if not isinstance(content, dict):
        raise DatasetError(
            f"{path}: top level is {kind(content)}, not a table with names and train. Correct the file."
        )
    if content.get("kpt_shape") is not None:
        raise DatasetError(f"{path}: labels of key points (kpt_shape), not of boxes. Give a data set with boxes.")
    return DataYaml(_names(path, content.get("names")), _splits(path, content))


def _names(path: Path, names: Any) -> dict[int, str]:
    if isinstance(names, list):
        names = dict(enumerate(names))
    is_table = isinstance(names, dict) and len(names) > 0
    if not is_table or not all(
        type(index) is int and index >= 0 and not isinstance(name, (dict, list)) for index, name in names.items()
    ):
        # Not shown: what anchors repeat is small in memory and endless as text.
        raise DatasetError(
            f"{path}: 'names' is not a list of class names or a table of numbered ones. Name the classes."
        )
    return {index: str(name) for index, name in names.items()}


def _splits(path: Path, content: dict[Any, Any]) -> dict[str, Path]:
    stated = content.get("path")
    base = path.parent / stated if isinstance(stated, str) else path.parent
    found: dict[str, Path] = {}
    for name in _SPLITS:
        value = content.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, list) and len(value) == 1:
            (value,) = value
        if not isinstance(value, str):
            raise DatasetError(
                f"{path}: {name!r} is {kind(value)}, not one folder or list of pictures. Put them in one folder."
            )
        # Beside data.yaml first: some exporters write ../train/images for the train/images that lies beside it.
        places = (base / value, path.parent / value, path.parent / value.removeprefix("../"))
        found[name] = next((place for place in places if place.exists()), places[0])
    if not found:
        raise DatasetError(f"{path}: names no pictures (no 'train', 'val' or 'test'). Add their folders.")
    return found
