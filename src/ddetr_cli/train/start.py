"""The model and the recipe a run starts with: from a preset, from another model, or as an earlier start left it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ddetr_cli.classes import ClassTable
from ddetr_cli.errors import DatasetError
from ddetr_cli.model.backbone import BACKBONES
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DetectionModel
from ddetr_cli.presets import DETR, ModelConfig, get_preset
from ddetr_cli.train.loop import Progress
from ddetr_cli.train.options import TrainOptions, check_trainable, not_a_run, read_config, resumed_options
from ddetr_cli.train.recipe import (
    Recipe,
    detr_recipe,
    finetune_recipe,
    finetune_scratch_recipe,
    paper_recipe,
    scratch_recipe,
)
from ddetr_cli.weights import load_backbone, load_model

DEFAULT_PRESET = "r50"


def starting_model(options: TrainOptions, classes: ClassTable, progress: Progress) -> DetectionModel:
    """The model before the first step, for these classes. Raises CheckpointError, UsageError or DatasetError.

    Of a resumed run it has the shape only: its weights are in the run's state.
    """
    if options.resume:
        return _model_of_the_run(options, classes)
    changes: dict[str, Any] = {"classes": len(classes)}
    if options.image_size is not None:
        changes["image_size"] = options.image_size
    if options.queries is not None:
        changes["queries"] = options.queries
    if options.init is not None:
        return _from_another(options.init, options.preset, changes, classes, progress)
    config = get_preset(options.preset or DEFAULT_PRESET, **changes)
    check_trainable(config)
    model = build_detector(config)
    has_frozen_stages = bool(BACKBONES[config.backbone].frozen_stages)
    if has_frozen_stages or options.backbone_weights is not None:
        tensors = load_backbone(config, options.backbone_weights, announce=progress.note)
        if tensors:
            model.backbone.load_state_dict(tensors)
        elif has_frozen_stages:
            progress.warn("the trunk starts from random weights, its frozen stages stay random: expect little.")
    return model


def starting_recipe(options: TrainOptions, config: ModelConfig, processes: int = 1) -> Recipe:
    """The recipe for this start with what was asked for: from another model, a pretrained trunk, or from nothing.

    A batch that was not asked for is the recipe's in each of ``processes``.
    """
    has_own_trunk = not BACKBONES[config.backbone].frozen_stages
    if options.init is not None:
        make = finetune_scratch_recipe if has_own_trunk else finetune_recipe
    elif has_own_trunk:
        make = scratch_recipe
    else:
        make = detr_recipe if config.family == DETR else paper_recipe
    named = {
        "epochs": options.epochs,
        "batch_size": options.batch_size or make().batch_size * processes,
        "schedule": options.schedule,
        "warmup_steps": options.warmup,
        "ema_decay": options.ema,
        "accumulate": options.accumulate,
        "freeze": options.freeze,
        "patience": options.patience,
        "augmentation": options.augmentation,
        "precision": options.precision,
    }
    changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    recipe = make(seed=options.seed, **changes)
    if options.learning_rate is not None:
        share = recipe.backbone_rate / recipe.learning_rate
        recipe = replace(recipe, learning_rate=options.learning_rate, backbone_rate=options.learning_rate * share)
    return recipe


def resumed_recipe(options: TrainOptions) -> Recipe:
    """The recipe of the run in ``options.output``, with what these change in it. Raises CheckpointError.

    The run's own numbers stay, whatever the defaults of this version are.
    """
    stored = read_config(options.output)
    try:
        recipe, config, processes = (
            Recipe(**stored["recipe"]),
            ModelConfig.from_dict(stored["model"]),
            stored["processes"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise not_a_run(options.output, error) from error
    if not options.override:
        return recipe
    before = starting_recipe(resumed_options(options.output), config, processes).to_dict()
    after = starting_recipe(options, config, processes).to_dict()
    return replace(recipe, **{name: value for name, value in after.items() if value != before[name]})


def _model_of_the_run(options: TrainOptions, classes: ClassTable) -> DetectionModel:
    stored = read_config(options.output)
    try:
        config = ModelConfig.from_dict(stored["model"])
        trained_on = ClassTable.from_json(stored["classes"])
        model = build_detector(config)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise not_a_run(options.output, error) from error
    if trained_on != classes:
        raise DatasetError(
            f"{options.output}: was started on other classes than the data set has now. "
            "Restore the data set, or start a new run with --init."
        )
    return model


def _from_another(
    spec: str, preset: str | None, changes: dict[str, Any], classes: ClassTable, progress: Progress
) -> DetectionModel:
    loaded = load_model(spec, preset=preset, announce=progress.note)
    for note in loaded.report.notes:
        progress.warn(note)
    check_trainable(loaded.config)
    old, new = loaded.config, replace(loaded.config, **changes)
    fresh: list[str] = []  # beginnings of the names of tensors that a model for something else cannot give
    if loaded.classes != classes:
        fresh.append("class_embed.")
        progress.warn("the data set has other classes than the checkpoint: the class heads start anew.")
    if old.queries != new.queries and not new.two_stage:
        fresh.append("query_embed.")
        progress.warn(f"{new.queries} queries instead of the checkpoint's {old.queries}: they start anew.")
    model = build_detector(new)
    state = {name: t for name, t in loaded.model.state_dict().items() if not name.startswith(tuple(fresh))}
    model.load_state_dict(state, strict=False)
    return model
