"""One training run from data set to checkpoints: what ``ddetr train`` does, callable from a program."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from ddetr_cli import __version__
from ddetr_cli.atomic import write_json
from ddetr_cli.classes import ClassTable
from ddetr_cli.data.findings import told
from ddetr_cli.distributed import Ranks, device_name, open_ranks
from ddetr_cli.errors import DatasetError, DeviceError, UsageError
from ddetr_cli.evaluate.mapping import map_classes
from ddetr_cli.inference.device import resolve_device
from ddetr_cli.presets import ModelConfig
from ddetr_cli.train.criterion import Criterion
from ddetr_cli.train.epochs import Epochs, NeverStop, StopRequest, TrainResult
from ddetr_cli.train.fingerprint import differences, fingerprint
from ddetr_cli.train.loop import Pace, Progress, Trainer
from ddetr_cli.train.memory import checkpoint_activations
from ddetr_cli.train.options import CONFIG, TrainOptions, not_a_run, read_config
from ddetr_cli.train.recipe import Recipe, freeze_parameters, parameter_groups
from ddetr_cli.train.run_state import clear_run, open_run
from ddetr_cli.train.splits import Split, crowded_images, read_splits
from ddetr_cli.train.start import resumed_recipe, starting_model, starting_recipe
from ddetr_cli.train.views import DrawBoxes, Views, check_tensorboard


class _Silent:
    """What all processes but the main one say."""

    def pace(self, pace: Pace) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def step(self, epoch: int, step: int, steps: int, loss: float) -> None: ...
    def epoch(self, row: dict[str, Any]) -> None: ...


def run_training(
    options: TrainOptions, progress: Progress, stop: StopRequest | None = None, draw: DrawBoxes | None = None
) -> TrainResult:
    """Train as ``options`` say, writing checkpoints and metrics under ``options.output``.

    With ``draw`` there are curves and validation pictures too.

    Where ``stop`` asks to, the run saves and returns after the step it is at. Started by torchrun in several
    processes, each of them calls this. Raises UsageError, DatasetError, CheckpointError, OutputError, DeviceError or
    DivergedError; everything up to the newest checkpoint stays.
    """
    if options.tensorboard:
        check_tensorboard()
    device = resolve_device(device_name(options.device), on_notice=progress.warn)
    with ExitStack() as stack:
        ranks = stack.enter_context(open_ranks(device))
        if not ranks.is_main:
            progress = _Silent()
        if ranks.is_main:
            stack.enter_context(open_run(options.output, resume=options.resume, overwrite=options.overwrite))
        ranks.from_main(None)  # nobody reads what the main process may have refused
        try:
            epochs = _prepare(options, progress, stop or NeverStop(), device, ranks)
            if ranks.is_main:
                epochs.views = Views(options.output, epochs.val, draw, progress.warn, tensorboard=options.tensorboard)
                stack.callback(epochs.views.close)
            with epochs.stop:
                return epochs.run()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(options, device) from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how the CPU allocator says it
                raise
            raise _out_of_memory(options, device) from error


def _prepare(
    options: TrainOptions, progress: Progress, stop: StopRequest, device: torch.device, ranks: Ranks
) -> Epochs:
    """The run before its next step."""
    train, val = read_splits(options, progress)
    splits = {"train": train, "val": val}
    classes = train.annotations.class_table()
    mapping = map_classes(classes, val.annotations.categories)
    for line in mapping.describe():
        progress.note(line)
    if options.resume and not options.override:
        _check_unchanged(options, splits, ranks)
    torch.manual_seed(options.seed)
    with ranks.main_first():
        model = starting_model(options, classes, progress)
    for sentence in told(train.annotations.path, crowded_images(train, model.config.queries)):
        progress.warn(sentence)
    recipe = resumed_recipe(options) if options.resume else starting_recipe(options, model.config, ranks.count)
    freeze_parameters(model, recipe.freeze)
    if options.checkpoint_activations:
        checkpoint_activations(model)
    criterion = Criterion(model.config.family, proposal_matches=recipe.proposal_matches)
    trainer = Trainer(model, criterion, recipe, parameter_groups(model, recipe), device, ranks)
    epochs = Epochs(options, trainer, model, classes, train, val, mapping, progress, stop)
    if options.resume:
        epochs.resume()
    if ranks.is_main and not options.resume:
        clear_run(options.output)
    if ranks.is_main and (options.override or not options.resume):
        _write_config(options, model.config, classes, recipe, splits, ranks)
    return epochs


def _check_unchanged(options: TrainOptions, splits: dict[str, Split], ranks: Ranks) -> None:
    """Raise DatasetError for another data set than the run began with, UsageError for other processes."""
    config = read_config(options.output)
    try:
        before, processes = config["data"], config["processes"]
        changed = [
            f"{name}: {', '.join(found)}"
            for name, split in splits.items()
            if (found := differences(before[name], fingerprint(split)))
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise not_a_run(options.output, error) from error
    if changed:
        raise DatasetError(
            f"{options.output}: the data set is not what it was when the run began ({'; '.join(changed)}). "
            "Restore it, or add --override to go on with what is there."
        )
    if processes != ranks.count:
        raise UsageError(
            f"{options.output}: was started with {processes} processes, not {ranks.count}; its numbers would differ "
            "in the last digits. Start as many, or add --override."
        )


def _write_config(
    options: TrainOptions,
    config: ModelConfig,
    classes: ClassTable,
    recipe: Recipe,
    splits: dict[str, Split],
    ranks: Ranks,
) -> None:
    write_json(
        options.output / CONFIG,
        {
            "ddetr_version": __version__,
            "torch_version": torch.__version__,
            "processes": ranks.count,
            "model": config.to_dict(),
            "recipe": recipe.to_dict(),
            "classes": classes.to_json(),
            "data": {
                name: {
                    "annotations": str(split.annotations.path.resolve()),
                    "images": str(split.images.resolve()),
                    **fingerprint(split),
                }
                for name, split in splits.items()
            },
            "options": replace(options, resume=False, override=False, overwrite=False).to_json(),
        },
    )


def _out_of_memory(options: TrainOptions, device: torch.device) -> DeviceError:
    free = ""
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        free = f", {free_bytes >> 20} of {total_bytes >> 20} MiB free now"
    return DeviceError(
        f"device {device}: out of memory{free}; the newest checkpoint is kept. Go on with: ddetr train --resume "
        f"{options.output} --override --accumulate N (the images of a step in N passes), or start with a smaller "
        "--batch-size or --image-size."
    )
