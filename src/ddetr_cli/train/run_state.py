"""What a run keeps on disk, and who may write there.

RUN/config.json       model, classes, recipe, data, options and versions: everything needed to read the run later
RUN/metrics.jsonl     one line an epoch
RUN/best.safetensors  the model with the best validation AP; RUN/last.safetensors that of the newest finished epoch
RUN/curves.png, RUN/pictures/, RUN/tensorboard/  see ``views``
RUN/checkpoints/      the states to go on from, see ``checkpoints``
RUN/diverged.safetensors  the state in which a training diverged
RUN/.lock             held while a training writes here
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddetr_cli.atomic import output_error, remove_leftovers, write_atomically
from ddetr_cli.errors import OutputError
from ddetr_cli.lock import LOCK_FILE, folder_lock
from ddetr_cli.train.options import CONFIG

BEST, LAST, METRICS, DIVERGED = "best.safetensors", "last.safetensors", "metrics.jsonl", "diverged.safetensors"
CHECKPOINTS = "checkpoints"
CURVES, PICTURES, TENSORBOARD = "curves.png", "pictures", "tensorboard"


@dataclass
class EpochSums:
    """What the steps of the epoch under way add up to; ``losses`` over the ``counted`` steps with a finite loss."""

    losses: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    skipped: int = 0
    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0  # of these: for pictures to arrive ...
    device_seconds: float = 0.0  # ... and for the device to finish
    own_pixels: int = 0  # of the main process' pictures ...
    pixels: int = 0  # ... and with padding

    def row(self) -> dict[str, Any]:
        """Their part of the line in metrics.jsonl."""
        return {
            "skipped_steps": self.skipped,
            "seconds": round(self.seconds, 3),
            "wait_seconds": round(self.wait_seconds, 3),
            "images_per_second": round(self.images / max(self.seconds, 1e-9), 3),
            "padding": round(self.pixels / max(self.own_pixels, 1), 4),
            **{name: value / max(self.counted, 1) for name, value in self.losses.items()},
        }


@dataclass
class RunState:
    """Where a run stands: ``epoch`` epochs are finished, and ``step`` steps of ``steps`` in the next."""

    epoch: int = 0
    step: int = 0
    steps: int = 0
    steps_done: int = 0
    bad_in_a_row: int = 0
    average_steps: int = 0
    best_ap: float = -1.0
    best_epoch: int = 0
    validations_since_best: int = 0
    unreadable: list[int] = field(default_factory=list)  # training images that others stand in for
    sums: EpochSums = field(default_factory=EpochSums)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunState:
        """What ``to_dict`` gave. Raises TypeError or KeyError for anything else."""
        return cls(**{**values, "sums": EpochSums(**values["sums"])})


@contextmanager
def open_run(run: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """RUN made and locked against a second training for the block; what a killed one left half-written is removed.

    Raises OutputError where it cannot be written, is in use, or holds something and is neither to be resumed nor
    overwritten. Nothing in it is deleted before ``clear_run``: a mistyped option must not cost an old run.
    """
    with folder_lock(run, "training"):
        is_empty = all(path.name == LOCK_FILE for path in run.iterdir())
        if not (is_empty or resume or overwrite):
            raise OutputError(
                f"{run}: is not empty. Go on with --resume {run}, start anew with --overwrite, or choose another."
            )
        if not is_empty:
            remove_leftovers(run)
        yield


def clear_run(run: Path) -> None:
    """Remove what an earlier training wrote into RUN, and nothing else. Raises OutputError."""
    written = [run / name for name in (BEST, LAST, METRICS, CONFIG, DIVERGED, CURVES)]
    written += (run / CHECKPOINTS).glob("step-*.safetensors")
    written += (run / PICTURES).glob("epoch_*.jpg")
    written += (run / TENSORBOARD).glob("events.out.*")
    for path in written:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(path, error) from error


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
