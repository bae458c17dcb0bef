"""Two reports of ``ddetr bench --json`` side by side: how many times as long the second takes for what both measured.

Their rounds were not taken in turns, so a ratio carries the spread of both: what lies within it is no difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddetr_cli.bench.tables import Table, milliseconds
from ddetr_cli.bench.timing import Samples
from ddetr_cli.errors import UsageError

# Which version of the document is read, and what tells one thing measured from another in it.
FORMAT = 2
_NAMES = ("name", "model", "program", "precision", "quantity", "direction", "shape", "points", "backend", "dtype")
# What must be equal for times to be comparable, and what makes the difference and has to be shown.
_INPUT = ("height", "width", "batch_size")
_MACHINE = ("cpu", "gpu", "cores", "threads", "allocator")
_VERSIONS = ("ddetr", "torch", "commit")


@dataclass(frozen=True)
class Pair:
    """One thing measured in both reports, in seconds."""

    name: str
    first: Samples
    second: Samples

    @property
    def ratio(self) -> float:
        """Of the medians, second to first: 0.5 is twice as fast."""
        return self.second.median / self.first.median

    @property
    def is_different(self) -> bool:
        """Whether the middle halves of the two lie apart."""
        return (
            self.first.quartiles[1] < self.second.quartiles[0] or self.second.quartiles[1] < self.first.quartiles[0]
        )


@dataclass(frozen=True)
class Comparison:
    """All pairs, and what else differs between the reports."""

    first: str
    second: str
    pairs: tuple[Pair, ...]
    only_in_one: tuple[str, ...]
    differences: tuple[str, ...]

    def table(self) -> Table:
        """One row per pair."""
        rows = tuple(
            (
                pair.name,
                milliseconds(pair.first.median),
                milliseconds(pair.second.median),
                f"{pair.ratio:.2f}x",
                ("slower" if pair.ratio > 1 else "faster") if pair.is_different else "within the noise",
            )
            for pair in self.pairs
        )
        notes = [*self.differences]
        if self.only_in_one:
            notes.append(f"only in one of them: {', '.join(self.only_in_one)}")
        return Table(
            f"{self.second} against {self.first}",
            ("measured", "first ms", "second ms", "second / first", "second is"),
            rows,
            notes=(*notes, "within the noise: the middle halves of the two overlap"),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; seconds."""
        return {
            "first": self.first,
            "second": self.second,
            "pairs": [
                {
                    "measured": pair.name,
                    "first_s": pair.first.median,
                    "second_s": pair.second.median,
                    "ratio": pair.ratio,
                    "is_different": pair.is_different,
                }
                for pair in self.pairs
            ],
            "only_in_one": list(self.only_in_one),
            "differences": list(self.differences),
        }


def compare_reports(first: Path, second: Path) -> Comparison:
    """The two reports of ``ddetr bench --json``. Raises UsageError for others, or nothing in common."""
    documents = [_read(path) for path in (first, second)]
    inputs = [_some(document["input"], _INPUT) for document in documents]
    if inputs[0] != inputs[1]:
        raise UsageError(
            f"{second}: measured at {_size(inputs[1])}, but {first} at {_size(inputs[0])}. Measure both alike."
        )
    times = [dict(_times(document["measurements"])) for document in documents]
    pairs = tuple(Pair(name, times[0][name], times[1][name]) for name in times[0] if name in times[1])
    if not pairs:
        raise UsageError(f"{first} and {second}: measured different things. Measure both with the same options.")
    differences = [
        f"{key}: {values[0]} / {values[1]}"
        for part, keys in (("machine", _MACHINE), ("versions", _VERSIONS))
        for key in keys
        if (values := [document[part].get(key) for document in documents])[0] != values[1]
    ]
    only = tuple(sorted(times[0].keys() ^ times[1].keys()))
    return Comparison(str(first), str(second), pairs, only, tuple(differences))


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        is_report = document["format"] == FORMAT and {"input", "machine", "versions", "measurements"} <= set(document)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}). Give a file of ddetr bench --json.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a report ({error}). Give a file of ddetr bench --json.") from error
    if not is_report:
        raise UsageError(f"{path}: not a report of this version. Measure again with ddetr bench --json.")
    return document  # type: ignore[no-any-return]


def _times(node: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[str, Samples]]:
    """Every series of seconds in a document, under the names of all that it lies in."""
    if isinstance(node, list):
        for item in node:
            yield from _times(item, where)
    elif isinstance(node, dict):
        where = (*where, *(str(node[key]) for key in ("kind", *_NAMES) if isinstance(node.get(key), str)))
        if "quantity" in node:
            for point in node["points"]:
                label = f"{point[node['quantity']]}"
                yield from _times(point, (*where, label))
            return
        for key, value in node.items():
            if isinstance(value, Mapping) and "samples" in value:
                if key not in ("ratio", "speedup", "efficiency", "joules"):  # those are no times
                    yield " ".join((*where, *([] if key == "seconds" else [key]))), Samples(tuple(value["samples"]))
            elif key != "ratios":
                yield from _times(value, where)


def _some(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: values.get(key) for key in keys}


def _size(values: Mapping[str, Any]) -> str:
    return f"{values['height']}x{values['width']}, batch {values['batch_size']}"
