"""One training step, ours and transformers': the same weights, pictures, objects, loss and optimizer, in turns.

Timed is everything from normalised pixels to changed weights: forward, matching, losses, backward, clipping, AdamW.
Ours is the step of ``ddetr train``. transformers' model stands in a usual loop, in fp32 and under bf16 autocast, with
our criterion as its loss, so that what differs is the model and not the matcher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ddetr_cli.bench.machine import peer_versions
from ddetr_cli.bench.options import CARD, TRAIN, BenchOptions
from ddetr_cli.bench.peers import TRANSFORMERS as TRANSFORMERS_FP32
from ddetr_cli.bench.peers import build_pair, missing_packages
from ddetr_cli.bench.published import PUBLISHED
from ddetr_cli.bench.subjects import open_model, random_pixels
from ddetr_cli.bench.tables import Listener, Table, middle_half, milliseconds, peer_notes, times_as
from ddetr_cli.bench.timing import Samples, noise_notes, time_interleaved
from ddetr_cli.errors import UsageError
from ddetr_cli.model.detector import DetectionModel, DetectorOutput
from ddetr_cli.ops.dense import gains_by_bf16
from ddetr_cli.presets import DEFORMABLE_DETR, DETR, PRESETS

OBJECTS = 7  # in every picture: COCO's mean
COCO_PICTURES, COCO_EPOCHS = 118_287, 50  # of train2017; of the paper's recipe
OURS = "ddetr "  # how programs of ours begin; then comes the precision
_TRAINED = (DEFORMABLE_DETR, DETR)  # families
# The authors' numbers; they do not decide the time.
_RATE, _DECAY, _CLIP = 2e-5, 1e-4, 0.1


class TrainingSteps(Protocol):
    """``ddetr train``'s own step and loss, on made-up objects that depend on the size of the batch alone."""

    def step(self, model: DetectionModel, precision: str, pixels: Tensor, objects: int) -> Callable[[], float]:
        """Learns from ``pixels`` (B,3,H,W) when called; returns the loss. Leaves ``model`` in training mode."""

    def loss(self, family: str, batch_size: int, objects: int) -> Callable[[DetectorOutput], Tensor]:
        """The total to minimise for a system of this family."""


@dataclass(frozen=True)
class StepResult:
    """One program: seconds of a step, and the loss of its first, before its weights were changed."""

    program: str
    is_ours: bool
    times: Samples
    first_loss: float

    def projected_hours(self, batch_size: int, epochs: int) -> float:
        """Of this machine, for ``epochs`` of COCO at the measured rate."""
        return COCO_PICTURES * epochs * self.times.median / batch_size / 3600


@dataclass(frozen=True)
class TrainingSection:
    """One model in every program."""

    model: str
    batch_size: int
    results: tuple[StepResult, ...]
    absent: dict[str, str]  # program -> why it was not measured
    versions: dict[str, str | None]
    key: str = TRAIN

    def ours(self) -> list[StepResult]:
        """Our precisions."""
        return [result for result in self.results if result.is_ours]

    @property
    def epochs(self) -> int:
        """Of the whole training that is projected: those of the published one."""
        published = PUBLISHED.get(self.model)
        return COCO_EPOCHS if published is None else published.epochs

    def shortest_hours(self) -> tuple[float, str]:
        """The fewest hours that the whole training would take in ours, and in which precision."""
        best = min(self.ours(), key=lambda result: result.times.median)
        return best.projected_hours(self.batch_size, self.epochs), best.program.removeprefix(OURS)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; ratios are of times, rival over ours."""
        return {
            "model": self.model,
            "projected_epochs": self.epochs,
            "programs": [
                {
                    "program": result.program,
                    "seconds": result.times.to_json(),
                    "first_loss": result.first_loss,
                    "projected_hours": result.projected_hours(self.batch_size, self.epochs),
                    "ratios": {ours.program: result.times.over(ours.times).to_json() for ours in self.ours()},
                }
                for result in self.results
            ],
            "absent": self.absent,
            "versions": self.versions,
        }

    def tables(self) -> list[Table]:
        """One row per program."""
        ours = self.ours()
        rows = [
            (
                result.program,
                milliseconds(result.times.median),
                middle_half(result.times),
                f"{self.batch_size / result.times.median:.2f}",
                *("" if result is other else times_as(result.times.over(other.times)) for other in ours),
                f"{result.first_loss:.3f}",
                f"{result.projected_hours(self.batch_size, self.epochs):,.0f}",
            )
            for result in self.results
        ]
        published = PUBLISHED.get(self.model)
        has_peers = len(self.results) > len(ours)
        return [
            Table(
                f"one training step of {self.model}",
                (
                    "program",
                    "median ms",
                    "quartiles",
                    "images/s",
                    *(f"/ {o.program}" for o in ours),
                    "first loss",
                    "projected h",
                ),
                tuple(rows),
                notes=(
                    "/: times as long as ours, median and quartiles of the rounds' ratios",
                    "same weights, objects, loss, frozen stages, clipping and AdamW; first losses differ by dropout",
                    f"projected: hours here for {COCO_PICTURES:,} pictures x {self.epochs} epochs at this rate"
                    + (f"; published: {published.train_hours:g} hours of a V100" if published else ""),
                    *peer_notes(self.versions if has_peers else {}, self.absent),
                    *noise_notes({result.program: result.times for result in self.results}),
                ),
            )
        ]


def measure_training(options: BenchOptions, steps: TrainingSteps, listener: Listener) -> list[TrainingSection]:
    """Every model of ``options`` in ours and, where there is a counterpart and it is installed, in transformers.

    Beside the card, those of its systems that are trained here. On the CPU. Raises UsageError for another device, or
    a model that is not trained here.
    """
    if options.device not in ("auto", "cpu"):
        raise UsageError(f"--train: compares on the CPU only, not on {options.device}. Add --device cpu.")
    unknown = {"fp16"} & set(options.precisions)
    if unknown:
        raise UsageError("--train: trains in fp32 or bf16. Leave fp16 out of --precision.")
    models = options.models
    if CARD in options.measurements:
        models = tuple(name for name in models if name not in PRESETS or PRESETS[name].family in _TRAINED)
    return [_compare(name, options, steps, listener) for name in models]


def _compare(name: str, options: BenchOptions, steps: TrainingSteps, listener: Listener) -> TrainingSection:
    pixels = random_pixels(options.size_hw, options.batch_size)
    best = "bf16" if gains_by_bf16() else "fp32"
    precisions = dict.fromkeys(best if precision == "auto" else precision for precision in options.precisions)
    missing = missing_packages(TRANSFORMERS_FP32)
    absent = {"transformers": f"not installed: {', '.join(missing)}"} if missing else {}
    runs: dict[str, Callable[[], float]] = {}
    with TemporaryDirectory(prefix="ddetr-bench-") as folder:

        def fresh(number: int) -> tuple[nn.Module | None, DetectionModel]:
            """A copy of its own for every candidate: each changes its weights."""
            if not absent:
                try:
                    theirs, ours = build_pair(name, Path(folder) / str(number))
                except UsageError as error:
                    absent["transformers"] = str(error)
                else:
                    return theirs, ours.model
            return None, open_model(name, listener).model

        for number, precision in enumerate(precisions):
            _, model = fresh(number)
            family = model.config.family
            if family not in _TRAINED:
                raise UsageError(f"--train: {name} is not trained here. Choose another of the presets.")
            runs[f"{OURS}{precision}"] = steps.step(model, precision, pixels, OBJECTS)
        for number, precision in enumerate(("fp32", "bf16"), start=len(precisions)):
            theirs, _ = fresh(number)
            if theirs is not None:
                loss = steps.loss(family, options.batch_size, OBJECTS)
                runs[f"transformers {precision}"] = _their_step(theirs, precision, pixels, loss)
    listener.expect(len(runs) * (options.warmup + options.rounds))
    first_losses = {}
    for program, run in runs.items():
        first_losses[program] = run()
        listener.ran()
    time_interleaved(runs, options.warmup - 1, on_run=listener.ran)
    times = time_interleaved(runs, options.rounds, on_run=listener.ran)
    results = tuple(
        StepResult(program, program.startswith(OURS), times[program], first_losses[program]) for program in runs
    )
    return TrainingSection(name, options.batch_size, results, absent, peer_versions())


def _their_step(
    theirs: nn.Module, precision: str, pixels: Tensor, loss: Callable[[DetectorOutput], Tensor]
) -> Callable[[], float]:
    """A step as one writes it around transformers' model, whose trunk freezes its first stages itself."""
    theirs.train()

    def our_loss(
        logits: Tensor, _labels: Any, _device: Any, boxes: Tensor, _config: Any, every_logits: Tensor,
        every_boxes: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], None]:  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            earlier = list(zip(every_logits[:-1].float(), every_boxes[:-1].float(), strict=True))
            return loss(DetectorOutput(logits.float(), boxes.float(), earlier)), {}, None

    cast(Any, theirs).loss_function = our_loss
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total = theirs(pixel_values=pixels, labels=[{} for _ in pixels]).loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        return float(total.detach())

    return step
