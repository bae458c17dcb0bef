"""What a run is asked for, as the command line hands it down and RUN/config.json keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddetr_cli.errors import CheckpointError, UsageError
from ddetr_cli.presets import FASTER_RCNN, PRESETS, ModelConfig

CONFIG = "config.json"
# Options of a run that --resume may change freely, because no number of the model depends on them ...
FREE_ON_RESUME = frozenset(
    {"device", "workers", "keep", "save_every", "cache", "checkpoint_activations", "tensorboard"}
)
# ... and those that it may change with --override.
OVERRIDABLE = frozenset(
    {
        "data", "split", "images", "annotations", "epochs", "batch_size", "learning_rate", "schedule", "warmup",
        "accumulate", "patience", "augmentation", "precision", "eval_every", "skip_bad_annotations", "skip_missing",
        "max_bad",
    }
)  # fmt: skip
# What an option that was left to the recipe is called there.
_IN_RECIPE = {"warmup": "warmup_steps", "ema": "ema_decay"}
TRAINABLE = tuple(name for name, config in PRESETS.items() if config.family != FASTER_RCNN)


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
    schedule: str | None = None
    warmup: int | None = None
    ema: float | None = None
    accumulate: int = 1
    freeze: str = "none"
    patience: int = 0
    augmentation: str | None = None
    precision: str = "fp32"
    eval_every: int = 1
    keep: int = 2
    save_every: float = 10.0
    seed: int = 42
    device: str = "auto"
    workers: int | None = None
    cache: bool = False
    checkpoint_activations: bool = False
    tensorboard: bool = False
    skip_bad_annotations: bool = False
    skip_missing: bool = False
    max_bad: float = 0.05
    resume: bool = False
    override: bool = False
    overwrite: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; paths become absolute, so that a run can be resumed from anywhere."""
        return {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in vars(self).items()}


def check_trainable(config: ModelConfig) -> None:
    """Raises UsageError for a system that only detects here."""
    if config.family == FASTER_RCNN:
        raise UsageError(
            f"{config.preset}: cannot be trained here (torchvision's Faster R-CNN, for detect, eval and bench). "
            "Choose another --preset, or train it with torchvision's own references/detection."
        )


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


def resumed_options(run: Path, given: Mapping[str, Any] | None = None, *, override: bool = False) -> TrainOptions:
    """The options ``run`` was started with, to go on with, and those ``given`` now.

    Raises UsageError where one of these differs and ``override`` is not given or cannot help, CheckpointError where
    config.json is not usable.
    """
    config, given = read_config(run), dict(given or {})
    try:
        stored: dict[str, Any] = dict(config["options"])
        for name in ("data", "images", "annotations"):
            stored[name] = None if stored[name] is None else Path(stored[name])
        options = TrainOptions(**{**stored, "output": run, "override": override, "resume": True, "overwrite": False})
        changed = [name for name in given if name not in FREE_ON_RESUME and _differs(options, config, name, given)]
    except (ValueError, KeyError, TypeError) as error:
        raise not_a_run(run, error) from error
    fixed = [name for name in changed if name not in OVERRIDABLE]
    refused = fixed or ([] if override else changed)
    if refused:
        differences = ", ".join(f"{name} {_was(options, config, name)}, not {given[name]}" for name in refused)
        remedy = "Leave that out, or start a new run with --init." if fixed else "Leave that out, or add --override."
        raise UsageError(f"--resume: {run} was started with {differences}. {remedy}")
    return replace(options, **given)


def _was(options: TrainOptions, config: dict[str, Any], name: str) -> Any:
    """What a run has for an option, also where it was left to the recipe."""
    value = getattr(options, name)
    return config["recipe"].get(_IN_RECIPE.get(name, name)) if value is None and "recipe" in config else value


def _differs(options: TrainOptions, config: dict[str, Any], name: str, given: Mapping[str, Any]) -> bool:
    before, now = _was(options, config, name), given[name]
    return bool(before != (now.resolve() if isinstance(now, Path) else now))
