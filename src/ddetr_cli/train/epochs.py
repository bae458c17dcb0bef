"""The epochs of one run: steps, validation, checkpoints, and stopping between any two steps without losing one."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self

from ddetr_cli.classes import ClassTable
from ddetr_cli.errors import DatasetError, DdetrError, DeviceError, DivergedError
from ddetr_cli.evaluate.mapping import ClassMapping
from ddetr_cli.evaluate.run import ImageResult
from ddetr_cli.model.detector import DetectionModel
from ddetr_cli.train.checkpoints import Checkpoints, megabytes
from ddetr_cli.train.dataset import Batch, TrainingSet, gigabytes
from ddetr_cli.train.loader import open_batches, usable_workers
from ddetr_cli.train.loop import Progress, StepResult, Trainer
from ddetr_cli.train.memory import available_bytes
from ddetr_cli.train.options import TrainOptions
from ddetr_cli.train.pace import Pacemaker
from ddetr_cli.train.recipe import rate_factor
from ddetr_cli.train.run_state import (
    BEST,
    DIVERGED,
    LAST,
    EpochSums,
    RunState,
    append_metrics,
    keep_metrics,
)
from ddetr_cli.train.sampler import BatchSampler
from ddetr_cli.train.snapshot import restore, snapshot, snapshot_bytes
from ddetr_cli.train.splits import Split
from ddetr_cli.train.validation import InMemoryModel, validate
from ddetr_cli.train.views import Views
from ddetr_cli.weights import save_checkpoint

# Pictures of an epoch that the padding is told of: a tenth of a second.
PADDING_SAMPLE = 2048


class StopRequest(Protocol):
    """Something that may ask a run to stop at its next step; listens while it is entered."""

    @property
    def requested(self) -> bool:
        """Whether it has."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...


class NeverStop:
    """The ``StopRequest`` of a program that does not want one."""

    requested = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """The best validation numbers and where the model with them is; ``stopped`` where the run was asked to stop."""

    best: Path
    best_epoch: int
    best_ap: float | None
    stopped: bool = False


class Epochs:
    """What is left of a run, from whatever step it stands at."""

    def __init__(
        self,
        options: TrainOptions,
        trainer: Trainer,
        model: DetectionModel,
        classes: ClassTable,
        train: Split,
        val: Split,
        mapping: ClassMapping,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        self.options, self.trainer, self.model, self.recipe = options, trainer, model, trainer.recipe
        self.classes, self.val, self.mapping = classes, val, mapping
        self.progress, self.stop, self.ranks = progress, stop, trainer.ranks
        self.output = options.output
        self.checkpoints = Checkpoints(options.output, options.keep)
        self.state = RunState()
        self.data = TrainingSet(
            train.annotations,
            train.images,
            classes,
            augmentation=self.recipe.augmentation,
            image_size=model.config.image_size,
            seed=self.recipe.seed,
        )
        self.sampler = BatchSampler(
            len(self.data),
            self.data.shapes,
            self.recipe.batch_size,
            self.recipe.seed,
            accumulate=self.recipe.accumulate,
            processes=self.ranks.count,
            index=self.ranks.index,
        )
        self.views: Views | None = None
        self._pace = Pacemaker(self.recipe.epochs, self.options.eval_every, trainer.device.type)
        self._unreadable: dict[int, str] = {}  # by this process since the last agreement
        self._untold: deque[tuple[int, StepResult]] = deque()
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Take up the newest state of the run. Raises CheckpointError."""
        stored = self.checkpoints.newest(self.progress.warn)
        self.state = restore(stored, self.trainer, self.checkpoints.folder)
        steps = self.sampler.steps
        if self.state.steps not in (0, steps):
            # Another batch size or data set: about as far into the epoch as before.
            self.state.step = self.state.step * steps // self.state.steps
        if self.ranks.is_main:
            keep_metrics(self.output, self.state.epoch)
        inside = f" and {self.state.step} of {steps} steps" if self.state.step else ""
        self.progress.note(f"{self.output}: going on after epoch {self.state.epoch} of {self.recipe.epochs}{inside}.")

    def run(self) -> TrainResult:
        """Train to the end, or until asked to stop. What ends it early with an error is saved first, where it can be.

        Raises DatasetError, DeviceError, OutputError, DivergedError.
        """
        if self._is_done():
            self.progress.warn(f"{self.output}: {self._why_done()}. Nothing is left to train.")
            return self._result()
        self._warn_of_small_disk()
        self._tell_padding()
        if self.options.cache:
            self._cache()
        workers = self._workers()
        while not self._is_done():
            try:
                is_whole = self._train(workers) and self._finish_epoch()
            except DivergedError as error:
                raise self._diverged(error) from error
            except (DatasetError, DeviceError):
                self._save_if_possible()
                raise
            if not is_whole:
                self._save()
                return self._result(stopped=True)
        self.progress.note(f"{self.output}: {self._why_done()}.")
        return self._result()

    def _train(self, workers: int) -> bool:
        """The steps of the epoch that are left; False where asked to stop before the last."""
        state, steps = self.state, self.sampler.steps
        state.steps = steps
        self.data.epoch = self.sampler.epoch = state.epoch
        self.sampler.first = state.step
        if state.step >= steps:
            return True
        self.trainer.train_mode()
        with open_batches(
            self.data, self.sampler, workers=workers, device=self.trainer.device, warn=self.progress.warn
        ) as batches:
            while state.step < steps:
                start = time.perf_counter()
                parts = list(islice(batches, self.recipe.accumulate))
                arrived = time.perf_counter()
                num_boxes = self._agree(parts)
                if num_boxes is None:
                    break
                factor = rate_factor(self.recipe, state.epoch * steps + state.step, steps)
                result = self.trainer.step(parts, factor=factor, num_boxes=num_boxes)
                seconds = time.perf_counter() - start
                self._count(parts, result, seconds, arrived - start)
                images = sum(len(part.targets) for part in parts) * self.ranks.count
                self._pace.step(images, seconds, arrived - start, result.device_seconds)
                self.progress.pace(self._pace.now(state.epoch, state.step, steps))
                self._untold.append((state.step, result))
                self._tell(wait=False)
                if self.ranks.is_main and time.monotonic() - self._saved_at >= 60 * self.options.save_every:
                    self._save()
        self._tell(wait=True)
        return state.step >= steps

    def _agree(self, parts: list[Batch]) -> float | None:
        """What the losses of the coming step are divided by; None where any process has been asked to stop.

        Raises DatasetError where too many images have become unreadable.
        """
        for part in parts:
            self._unreadable |= {i: why for i, why in part.unreadable if i not in self.state.unreadable}
        objects = sum(len(target.labels) for part in parts for target in part.targets)
        sums = self.ranks.total([objects, self.stop.requested, len(self._unreadable)])
        objects_of_all, stops, unreadable = sums
        if unreadable:
            self._stand_in()
        return None if stops else max(objects_of_all / self.ranks.count, 1.0)

    def _stand_in(self) -> None:
        """Warn of images that others stand in for, and refuse more than a few."""
        found = {i: why for share in self.ranks.gather(self._unreadable) for i, why in share.items()}
        self._unreadable = {}
        for why in found.values():
            self.progress.warn(f"{why} Another image stands in for it.")
        self.state.unreadable = sorted({*self.state.unreadable, *found})
        count, total = len(self.state.unreadable), len(self.data)
        if count > max(1, self.options.max_bad * total):
            raise DatasetError(
                f"{self.data.images}: {count} of {total} training images became unreadable during the training. "
                f"Restore them, then go on with: ddetr train --resume {self.output}"
            )

    def _count(self, parts: list[Batch], result: StepResult, seconds: float, waited: float) -> None:
        state, sums = self.state, self.state.sums
        state.step += 1
        sums.images += sum(len(part.targets) for part in parts) * self.ranks.count
        sums.own_pixels += sum(part.own_pixels for part in parts)
        sums.pixels += sum(part.pixels[:, 0].numel() for part in parts)
        sums.seconds += seconds
        sums.wait_seconds += waited
        sums.device_seconds += result.device_seconds

    def _tell(self, *, wait: bool) -> None:
        """Tell of, and add up, the steps whose numbers have come from the device; if ``wait``, all there were."""
        if wait:
            self.trainer.settle()
        sums = self.state.sums
        while self._untold and (wait or self._untold[0][1].is_known):
            step, result = self._untold.popleft()
            if result.terms:
                sums.counted += 1
                for name, value in {"loss": result.loss, **result.terms}.items():
                    sums.losses[name] = sums.losses.get(name, 0.0) + value
            else:
                sums.skipped += 1
            self.progress.step(self.state.epoch + 1, step, self.state.steps, result.loss)

    def _finish_epoch(self) -> bool:
        """Validate and keep what the epoch gave; False where asked to stop before it was validated."""
        state, epoch, steps = self.state, self.state.epoch + 1, self.sampler.steps
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.trainer.steps_done,
            # Of the epoch's last step, which a resumed run may not have taken itself.
            "learning_rate": self.trainer.base_rates[0] * rate_factor(self.recipe, epoch * steps - 1, steps),
            **state.sums.row(),
            "bottleneck": self._pace.bottleneck(
                state.sums.seconds, state.sums.wait_seconds, state.sums.device_seconds
            ),
        }
        if state.unreadable:
            row["unreadable_images"] = len(state.unreadable)
        results: tuple[ImageResult, ...] = ()
        start = time.perf_counter()
        with self.trainer.evaluation():
            if epoch == self.recipe.epochs or epoch % self.options.eval_every == 0:
                found = validate(
                    InMemoryModel(self.model, self.model.config, self.classes),
                    self.val,
                    self.mapping,
                    device=self.trainer.device,
                    precision=self.recipe.precision,
                    ranks=self.ranks,
                    should_stop=lambda: self.stop.requested,
                )
                if found is None:
                    return False
                row["val"] = found.metrics.to_json(per_class=True)
                results = found.results
                self._judge(found.metrics.overall["AP"], epoch)
            self._save_model(LAST, epoch)
        # In this order: after a kill in between, resuming drops the line and repeats the end of the epoch.
        if self.ranks.is_main:
            append_metrics(self.output, row)
        self._pace.end_of_epoch(time.perf_counter() - start, is_validated=bool(row.get("val")))
        state.epoch, state.step, state.sums = epoch, 0, EpochSums()
        self._save()
        self.progress.epoch(row)
        if self.views is not None:
            self.views.epoch(row, results, is_last=self._is_done())
        return True

    def _judge(self, ap: float | None, epoch: int) -> None:
        ap = -1.0 if ap is None else ap
        if ap > self.state.best_ap or not self.state.best_epoch:
            self.state.best_ap, self.state.best_epoch, self.state.validations_since_best = ap, epoch, 0
            self._save_model(BEST, epoch)
        else:
            self.state.validations_since_best += 1

    def _save_model(self, name: str, epoch: int) -> None:
        if self.ranks.is_main:
            extra = {"epoch": str(epoch), "recipe": json.dumps(self.recipe.to_dict())}
            save_checkpoint(self.output / name, self.model, self.classes, extra=extra)

    def _save(self) -> None:
        if self.ranks.is_main:
            self._tell(wait=True)
            self.checkpoints.save(self.trainer.steps_done, snapshot(self.state, self.trainer))
        self._saved_at = time.monotonic()

    def _save_if_possible(self) -> None:
        """Save before an error ends the run; a second error must not hide the first."""
        if self.ranks.is_main and self.trainer.is_between_steps:
            try:
                self._save()
            except (DdetrError, MemoryError) as error:
                self.progress.warn(f"{error} The newest checkpoint is older than this step.")
            else:
                self.progress.warn(f"{self.output}: saved. Go on with: ddetr train --resume {self.output}")

    def _diverged(self, error: DivergedError) -> DivergedError:
        good = next((path.name for path in self.checkpoints.found()), "none yet")
        if self.ranks.is_main:
            self._tell(wait=True)
            with suppress(DdetrError):
                self.checkpoints.save_apart(self.output / DIVERGED, snapshot(self.state, self.trainer))
        return DivergedError(
            f"{error} The last good checkpoint is kept ({good}); the state at that point is in "
            f"{self.output / DIVERGED}."
        )

    def _is_done(self) -> bool:
        return self.state.epoch >= self.recipe.epochs or self._has_lost_patience()

    def _has_lost_patience(self) -> bool:
        return 0 < self.recipe.patience <= self.state.validations_since_best

    def _why_done(self) -> str:
        if self.state.epoch >= self.recipe.epochs:
            return f"all {self.recipe.epochs} epochs are done (--resume with --epochs N --override trains longer)"
        return (
            f"stopped after epoch {self.state.epoch}, {self.recipe.patience} validations without a better AP "
            "(--resume with --patience N --override goes on)"
        )

    def _result(self, *, stopped: bool = False) -> TrainResult:
        ap = None if self.state.best_ap < 0 else self.state.best_ap
        return TrainResult(self.output / BEST, self.state.best_epoch, ap, stopped)

    def _workers(self) -> int:
        wanted = self.options.workers
        if wanted is None:
            wanted = 0 if self.trainer.device.type == "cpu" else 8
        per_pass = -(-self.recipe.batch_size // (self.recipe.accumulate * self.ranks.count))
        return usable_workers(wanted, per_pass, self.model.config.image_size, self.progress.warn)

    def _tell_padding(self) -> None:
        if not self.ranks.is_main:
            return
        self.sampler.epoch = self.state.epoch
        ours, shuffled = self.sampler.padding(PADDING_SAMPLE)
        if shuffled >= 1.005:
            self.progress.note(
                f"padding {shuffled:.2f}x -> {ours:.2f}x of the pictures' own pixels, by batching those of like shape"
            )

    def _cache(self) -> None:
        """Keep the pictures in memory; every process of a training its own. Raises UsageError."""
        available = available_bytes()
        here = self.ranks.gather(socket.gethostname())
        if available is not None:
            available //= here.count(socket.gethostname())
        size = self.data.cache_all(available)
        self.progress.note(f"--cache: {len(self.data)} decoded pictures take {gigabytes(size)} of memory")

    def _warn_of_small_disk(self) -> None:
        size, free = snapshot_bytes(self.trainer), shutil.disk_usage(self.output).free
        if self.ranks.is_main and free < 3 * size:
            self.progress.warn(
                f"{self.output}: {megabytes(free)} free, and a checkpoint takes {megabytes(size)}: room for fewer "
                "than three. Free space, or the run ends at the first that does not fit."
            )
