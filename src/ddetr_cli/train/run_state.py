"""What a run keeps on disk, and how it goes on after an interruption.

RUN/config.json      model, classes, recipe, data, options and versions: everything needed to read the run later
RUN/metrics.jsonl    one line an epoch
RUN/best.safetensors the model with the best validation AP; RUN/last.safetensors the newest
RUN/state.pth        weights, optimizer, averages and counters of the last finished epoch, for --resume
RUN/.lock            held while a training writes here
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddetr_cli.atomic import atomic_file, output_error, remove_leftovers, write_atomically
from ddetr_cli.errors import CheckpointError, OutputError
from ddetr_cli.train.options import CONFIG

STATE_FORMAT = 1
BEST, LAST, STATE, METRICS = "best.safetensors", "last.safetensors", "state.pth", "metrics.jsonl"
_LOCK = ".lock"


@dataclass
class RunState:
    """Where a run stands after ``epoch`` finished epochs."""

    epoch: int
    step: int
    best_ap: float
    best_epoch: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    average: dict[str, torch.Tensor] | None
    average_steps: int
    recipe: dict[str, Any]

    def save(self, run: Path) -> None:
        """Replace RUN/state.pth. Raises OutputError."""
        with atomic_file(run / STATE) as file:
            torch.save({"format": STATE_FORMAT, **vars(self)}, file)

    @classmethod
    def load(cls, run: Path) -> RunState:
        """The state to resume from. Raises CheckpointError where there is none, or it is damaged or newer."""
        path = run / STATE
        if not path.is_file():
            raise CheckpointError(
                f"{path}: not there (no epoch of this run was finished). Start it without --resume."
            )
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{path}: damaged ({type(error).__name__}). Start a new run with --init."
            ) from error
        if not isinstance(values, dict) or values.pop("format", None) != STATE_FORMAT:
            raise CheckpointError(
                f"{path}: written by another version of ddetr. Resume with the version that wrote it."
            )
        return cls(**values)


@contextmanager
def open_run(run: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """RUN made and locked against a second training for the block; what a killed one left half-written is removed.

    Raises OutputError where it cannot be written, is in use, or holds something and is neither to be resumed nor
    overwritten. Nothing in it is deleted before ``clear_run``: a mistyped option must not cost an old run.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        is_empty = all(path.name == _LOCK for path in run.iterdir())
        if not (is_empty or resume or overwrite):
            raise OutputError(
                f"{run}: is not empty. Go on with --resume {run}, start anew with --overwrite, or choose another."
            )
        lock = open(run / _LOCK, "w")  # noqa: SIM115 held for the whole run
    except OSError as error:
        raise OutputError(f"{run}: cannot be written ({error.strerror}). Choose another --output.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"{run}: another training is writing here. Wait for it, or choose another --output."
            ) from error
        if not is_empty:
            remove_leftovers(run)
        yield


def clear_run(run: Path) -> None:
    """Remove what an earlier training wrote into RUN, and nothing else. Raises OutputError."""
    for name in (BEST, LAST, STATE, METRICS, CONFIG):
        try:
            (run / name).unlink(missing_ok=True)
        except OSError as error:
            raise output_error(run / name, error) from error


def append_metrics(run: Path, row: dict[str, Any]) -> None:
    """Add one line to RUN/metrics.jsonl, flushed. Raises OutputError."""
    try:
        with open(run / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:
        raise output_error(run / METRICS, error) from error


def keep_metrics(run: Path, epochs: int) -> None:
    """Drop lines of RUN/metrics.jsonl past ``epochs``: those a resumed run is about to write again."""
    path = run / METRICS
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["epoch"] <= epochs:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a kill
    write_atomically(path, "".join(line + "\n" for line in kept).encode(), durable=True)
