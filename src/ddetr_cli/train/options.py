"""What a run is asked for, as the command line hands it down and RUN/config.json keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddetr_cli.errors import CheckpointError

CONFIG = "config.json"


@dataclass(frozen=True)
class TrainOptions:
    """What a run is asked for; None means the default of the preset, the recipe or the checkpoint."""

    output: Path
    data: Path | None = None
    split: str | None = None
    images: Path | None = None
    annotations: Path | None = None
    preset: str | None = None
    init: str | None = None
    backbone_weights: str | None = None
    queries: int | None = None
    image_size: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    augmentation: str | None = None
    precision: str = "fp32"
    eval_every: int = 1
    seed: int = 42
    device: str = "auto"
    workers: int | None = None
    resume: bool = False
    overwrite: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; paths become absolute, so that a run can be resumed from anywhere."""
        return {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in vars(self).items()}


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json. Raises CheckpointError where there is none, or it is not a table."""
    path = run / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise not_a_run(run, error) from error
    if not isinstance(config, dict):
        raise not_a_run(run, "it is not a table")
    return config


def not_a_run(run: Path, reason: object) -> CheckpointError:
    """The refusal of a folder whose config.json is absent or says nothing usable."""
    return CheckpointError(f"{run / CONFIG}: not a run to resume ({reason}). Give the --output folder of a training.")


def resumed_options(run: Path, *, device: str, workers: int | None) -> TrainOptions:
    """The options ``run`` was started with, to go on with. Raises CheckpointError where config.json is not usable."""
    config = read_config(run)
    try:
        stored: dict[str, Any] = dict(config["options"])
        for name in ("data", "images", "annotations"):
            stored[name] = None if stored[name] is None else Path(stored[name])
        options = TrainOptions(**{**stored, "output": run})
    except (ValueError, KeyError, TypeError) as error:
        raise not_a_run(run, error) from error
    return replace(options, device=device, workers=workers, resume=True, overwrite=False)
