"""One training run from data set to checkpoints: what ``ddetr train`` does, callable from a program."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ddetr_cli import __version__
from ddetr_cli.atomic import write_json
from ddetr_cli.classes import ClassTable
from ddetr_cli.errors import CheckpointError
from ddetr_cli.evaluate.mapping import ClassMapping, map_classes
from ddetr_cli.evaluate.metrics import CocoMetrics, evaluate_detections
from ddetr_cli.evaluate.run import predict_images
from ddetr_cli.inference.device import resolve_device
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.model.detector import DeformableDetr
from ddetr_cli.presets import ModelConfig
from ddetr_cli.train.dataset import BatchSampler, TrainingSet, collate, read_batches
from ddetr_cli.train.loop import Progress, Trainer
from ddetr_cli.train.options import CONFIG, TrainOptions
from ddetr_cli.train.recipe import Recipe, parameter_groups
from ddetr_cli.train.run_state import (
    BEST,
    LAST,
    STATE,
    RunState,
    append_metrics,
    clear_run,
    keep_metrics,
    open_run,
)
from ddetr_cli.train.splits import Split, read_splits
from ddetr_cli.train.start import starting_model, starting_recipe
from ddetr_cli.weights import save_checkpoint


@dataclass(frozen=True)
class TrainResult:
    """The best validation numbers and where the model with them is."""

    best: Path
    best_epoch: int
    best_ap: float | None


@dataclass(frozen=True)
class InMemoryModel:
    """The model being trained, as the predictor wants it."""

    model: DeformableDetr
    config: ModelConfig
    classes: ClassTable


def run_training(options: TrainOptions, progress: Progress) -> TrainResult:
    """Train as ``options`` say, writing checkpoints and metrics under ``options.output``.

    Raises UsageError, DatasetError, CheckpointError, OutputError, DeviceError or DivergedError; finished epochs stay.
    """
    device = resolve_device(options.device, on_notice=progress.warn)
    with open_run(options.output, resume=options.resume, overwrite=options.overwrite):
        train, val = read_splits(options, progress)
        classes = train.annotations.class_table()
        mapping = map_classes(classes, val.annotations.categories)
        for line in mapping.describe():
            progress.note(line)
        torch.manual_seed(options.seed)
        model = starting_model(options, classes, progress)
        recipe = starting_recipe(options, model.config)
        if not options.resume:
            clear_run(options.output)
            _write_config(options, model.config, classes, recipe, {"train": train, "val": val})
        trainer = Trainer(model, recipe, parameter_groups(model, recipe), device)
        return _Run(options, trainer, model, classes, train, val, mapping, progress).run()


class _Run:
    """The epochs of one run."""

    def __init__(
        self,
        options: TrainOptions,
        trainer: Trainer,
        model: DeformableDetr,
        classes: ClassTable,
        train: Split,
        val: Split,
        mapping: ClassMapping,
        progress: Progress,
    ) -> None:
        self.options, self.trainer, self.model, self.recipe = options, trainer, model, trainer.recipe
        self.classes, self.val, self.mapping, self.progress = classes, val, mapping, progress
        self.output = options.output
        self.best_ap, self.best_epoch = -1.0, 0
        self.data = TrainingSet(
            train.annotations,
            train.images,
            classes,
            augmentation=self.recipe.augmentation,
            image_size=model.config.image_size,
            seed=self.recipe.seed,
        )
        aspects = [image.width / image.height for image in train.annotations.images]
        self.sampler = BatchSampler(aspects, self.recipe.batch_size, self.recipe.seed)

    def run(self) -> TrainResult:
        """All epochs that are not done yet."""
        first = self._resume() if self.options.resume else 0
        if first >= self.recipe.epochs:
            self.progress.note(f"{self.output}: all {self.recipe.epochs} epochs are done already.")
        for epoch in range(first, self.recipe.epochs):
            self._epoch(epoch)
        return TrainResult(self.output / BEST, self.best_epoch, None if self.best_ap < 0 else self.best_ap)

    def _epoch(self, epoch: int) -> None:
        self.data.epoch = self.sampler.epoch = epoch
        # Dropout draws from torch's generator: seeded per epoch, a resumed run repeats an uninterrupted one.
        torch.manual_seed((self.recipe.seed << 16) + epoch)
        workers = self.options.workers
        if workers is None:
            workers = 0 if self.trainer.device.type == "cpu" else 8
        loader = DataLoader(
            self.data,
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=self.trainer.device.type == "cuda",
        )
        result = self.trainer.train_epoch(read_batches(loader), epoch + 1, len(loader), self.progress)
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": self.trainer.steps_done,
            "learning_rate": self.trainer.optimizer.param_groups[0]["lr"],
            "skipped_steps": result.skipped_steps,
            "seconds": round(result.seconds, 3),
            "images_per_second": round(result.images / max(result.seconds, 1e-9), 3),
            **result.losses,
        }
        is_last = epoch + 1 == self.recipe.epochs
        with self._averaged():
            if is_last or (epoch + 1) % self.options.eval_every == 0:
                metrics = self._validate()
                row["val"] = metrics.to_json(per_class=True)
                ap = metrics.overall["AP"]
                ap = -1.0 if ap is None else ap
                if ap > self.best_ap or not (self.output / BEST).exists():
                    self.best_ap, self.best_epoch = ap, epoch + 1
                    self._save(BEST, epoch + 1)
            self._save(LAST, epoch + 1)
        # In this order: after a kill in between, resuming drops the line and repeats the epoch.
        append_metrics(self.output, row)
        self._save_state(epoch + 1)
        self.progress.epoch(row)

    def _validate(self) -> CocoMetrics:
        weights = InMemoryModel(self.model, self.model.config, self.classes)
        predictor = Predictor(weights, device=self.trainer.device, precision=self.recipe.precision)
        results = predict_images(
            predictor, self.val.annotations, self.val.images, self.mapping, batch_size=8, map_missing="drop"
        )
        return evaluate_detections(
            self.val.annotations, [detection for result in results for detection in result.detections]
        )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model in evaluation mode, with its averaged weights where there are any, for the block."""
        average = self.trainer.average
        own = None
        if average is not None:
            own = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(average.state)
        self.model.eval()
        try:
            yield
        finally:
            if own is not None:
                self.model.load_state_dict(own)

    def _save(self, name: str, epoch: int) -> None:
        extra = {"epoch": str(epoch), "recipe": json.dumps(self.recipe.to_dict())}
        save_checkpoint(self.output / name, self.model, self.classes, extra=extra)

    def _save_state(self, epoch: int) -> None:
        average = self.trainer.average
        RunState(
            epoch=epoch,
            step=self.trainer.steps_done,
            best_ap=self.best_ap,
            best_epoch=self.best_epoch,
            model=self.model.state_dict(),
            optimizer=self.trainer.optimizer.state_dict(),
            average=average.state if average else None,
            average_steps=average.steps if average else 0,
            recipe=self.recipe.to_dict(),
        ).save(self.output)

    def _resume(self) -> int:
        """Load the newest state; returns the epochs it has finished."""
        state = RunState.load(self.output)
        changed = [k for k, v in self.recipe.to_dict().items() if k in state.recipe and state.recipe[k] != v]
        if changed:
            raise CheckpointError(
                f"{self.output}: was trained with another {', '.join(changed)}; its config.json was changed. "
                "Restore it, or start a new run with --init."
            )
        try:
            self.model.load_state_dict(state.model)
            self.trainer.optimizer.load_state_dict(state.optimizer)
            if self.trainer.average is not None and state.average is not None:
                self.trainer.average.restore(state.average, state.average_steps)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.output / STATE}: belongs to another model ({str(error).splitlines()[0]}). "
                "Restore the run's config.json, or start a new run with --init."
            ) from error
        self.trainer.steps_done, self.best_ap, self.best_epoch = state.step, state.best_ap, state.best_epoch
        keep_metrics(self.output, state.epoch)
        self.progress.note(f"{self.output}: going on after epoch {state.epoch} of {self.recipe.epochs}.")
        return state.epoch


def _write_config(
    options: TrainOptions, config: ModelConfig, classes: ClassTable, recipe: Recipe, splits: dict[str, Split]
) -> None:
    write_json(
        options.output / CONFIG,
        {
            "ddetr_version": __version__,
            "torch_version": torch.__version__,
            "model": config.to_dict(),
            "recipe": recipe.to_dict(),
            "classes": classes.to_json(),
            "data": {
                name: {
                    "annotations": str(split.annotations.path.resolve()),
                    "images": str(split.images.resolve()),
                    "image_count": len(split.annotations.images),
                    "box_count": len(split.annotations.annotations),
                }
                for name, split in splits.items()
            },
            "options": options.to_json(),
        },
    )
