"""The model card's table, published and measured: every system's size, speed, memory and energy, in turns.

The published figures are the authors', on a V100 of 2020; what stands beside them was measured here and now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ddetr_cli.bench.energy import EnergyMeter
from ddetr_cli.bench.flops import FLOPS_CONVENTION
from ddetr_cli.bench.latency import LATENCY_CONVENTION
from ddetr_cli.bench.memory import peak_process_memory
from ddetr_cli.bench.options import CARD, BenchOptions
from ddetr_cli.bench.published import Published
from ddetr_cli.bench.sizes import SizeResult, measure_sizes
from ddetr_cli.bench.subjects import RANDOM_WEIGHTS, BenchModel, Subject, random_pixels
from ddetr_cli.bench.tables import Listener, Silence, Table, milliseconds, times_as
from ddetr_cli.bench.timing import Samples, noise_notes, time_interleaved
from ddetr_cli.errors import DeviceError

# A larger batch is worth its memory and its wait only if it gives so many times the rate.
WORTHWHILE = 1.02
LARGEST_BATCH = 64

_PATH_NOTE = (
    "path: fast is our own inference, of Deformable DETR alone; what runs as plain PyTorch is compared as a program "
    "too, not only as a method"
)
_CPU_NOTE = "peak: of a process that runs this model alone; on a CPU every image runs alone, whatever the batch"


@dataclass(frozen=True)
class Speed:
    """One system in one precision.

    ``is_fast``: our own path for inference ran, not the model as it stands in PyTorch.
    ``times``: seconds of one picture at batch 1; ``best_batch`` the batch with the highest rate, ``best_times`` its
    seconds; ``peak_memory`` in bytes, of the device or, on the CPU, of a process that does nothing else; ``joules``
    of the whole processor for each picture. None is what this machine does not say.
    """

    precision: str
    is_fast: bool
    times: Samples
    best_batch: int
    best_times: Samples
    peak_memory: int | None
    joules: Samples | None

    @property
    def best_rate(self) -> float:
        """Images per second at the best batch."""
        return self.best_batch / self.best_times.median


class TrainingHours(NamedTuple):
    """What the whole training would take here, and in which precision."""

    hours: float
    precision: str


@dataclass(frozen=True)
class CardRow:
    """One system: its size, and its speed in every precision.

    ``metrics``: AP and the like where it was scored; ``training``: where a step was timed, the hours of the whole
    training at that rate, and in which precision.
    """

    name: str
    weights: str
    size: SizeResult
    speeds: tuple[Speed, ...]
    metrics: Mapping[str, float | None] | None = None
    training: TrainingHours | None = None

    @property
    def published(self) -> Published | None:
        """What the authors say of it."""
        return self.size.published


# Scores of a model in a precision on a device, by their names in COCO: AP, AP50, APs ...
Scoring = Callable[[BenchModel, str, torch.device], Mapping[str, float | None]]


@dataclass(frozen=True)
class CardSection:
    """All systems at one picture size, on one device."""

    size_hw: tuple[int, int]
    device: str
    rows: tuple[CardRow, ...]
    key: str = CARD

    def to_json(self) -> list[dict[str, Any]]:
        """One object per system; seconds of a batch, bytes, joules per picture."""
        return [
            {
                **row.size.to_json(),
                "weights": row.weights,
                "published": None if row.published is None else vars(row.published),
                "metrics": None if row.metrics is None else dict(row.metrics),
                "training": None if row.training is None else row.training._asdict(),
                "speeds": [
                    {
                        "precision": speed.precision,
                        "is_fast_path": speed.is_fast,
                        "seconds": speed.times.to_json(),
                        "images_per_second": 1 / speed.times.median,
                        "best_batch": speed.best_batch,
                        "best_images_per_second": speed.best_rate,
                        "peak_memory_bytes": speed.peak_memory,
                        "joules": None if speed.joules is None else speed.joules.to_json(),
                    }
                    for speed in row.speeds
                ],
            }
            for row in self.rows
        ]

    def tables(self) -> list[Table]:
        """A row for each system, published beside measured; then all that was measured of their speeds."""
        return [self._systems(), self._speeds()]

    def _systems(self) -> Table:
        height, width = self.size_hw
        is_scored = any(row.metrics for row in self.rows)
        times = {f"{row.name} {speed.precision}": speed.times for row in self.rows for speed in row.speeds}
        has_mean = any(row.size.val_flops is not None for row in self.rows)
        counted = "here the same mean" if has_mean else f"here at {height}x{width}"
        headings = (
            *("system", "epochs", "AP", "AP small"),
            *(["measured AP", "measured AP small"] if is_scored else []),
            *("params M", "GFLOPs", "published GFLOPs", "difference"),
            *("images/s" for _ in self.rows[0].speeds),
            *("path", "training hours"),
        )
        return Table(
            "systems: AP published, size and speed measured here",
            headings,
            tuple(_system_cells(row, self.size_hw, is_scored=is_scored) for row in self.rows),
            notes=(
                "epochs, AP, AP small: published, COCO val2017",
                "Faster R-CNN's AP is that of the authors' table; torchvision's weights, used here, have 37.0",
                f"GFLOPs: {FLOPS_CONVENTION}, {counted}; published: a mean over the first 100 pictures of val2017",
                f"images/s: batch 1 at {height}x{width}, median and quartiles",
                *self._path_notes(),
                "training hours: V100, published, unless a step was timed here",
                *noise_notes(times),
            ),
        )

    def _speeds(self) -> Table:
        has_energy = any(speed.joules is not None for row in self.rows for speed in row.speeds)
        base = next((row for row in self.rows if row.name == "r50"), self.rows[0])
        times = {f"{row.name} {speed.precision}": speed.times for row in self.rows for speed in row.speeds}
        headings = ("V100 b1", "V100 b4", "here b1", "best (batch)", "p50 ms", "p90 ms", "p99 ms")
        return Table(
            "images per second, published on a V100 at batch 1 and 4, and measured here",
            (
                *("system", "precision", *headings, f"time / {base.name}", "path", "peak MiB"),
                *(["J per image"] if has_energy else []),
            ),
            tuple(
                _speed_cells(row, speed, other, has_energy=has_energy)
                for row in self.rows
                for speed, other in zip(row.speeds, base.speeds, strict=True)
            ),
            labels=2,
            notes=(
                f"timed: {LATENCY_CONVENTION}; time / {base.name}: median and quartiles of the rounds' ratios",
                *self._path_notes(),
                _CPU_NOTE if self.device == "cpu" else "peak: of the device",
                *(["J: of the whole processor, whoever else used it"] if has_energy else []),
                *noise_notes(times),
            ),
        )

    def _path_notes(self) -> tuple[str, ...]:
        """What has to be known of ratios between systems, where they do not run alike."""
        return (_PATH_NOTE,) if len({speed.is_fast for row in self.rows for speed in row.speeds}) > 1 else ()


def _system_cells(row: CardRow, size_hw: tuple[int, int], *, is_scored: bool) -> tuple[str, ...]:
    size, published, metrics = row.size, row.published, row.metrics
    cells = [""] * 3
    if published is not None:
        cells = [str(published.epochs), f"{published.ap:.1f}", f"{published.ap_small:.1f}"]
    if is_scored:
        cells += ["", ""] if metrics is None else [_per_cent(metrics[name]) for name in ("AP", "APs")]
    cells.append(f"{size.size.parameters / 1e6:.2f}")
    cells.append(f"{(size.size.flops if size.val_flops is None else size.val_flops) / 1e9:.1f}")
    difference = size.difference(size_hw)
    cells.append("" if published is None else f"{published.flops / 1e9:.0f}")
    cells.append("" if difference is None else f"{difference:+.1%}")
    for speed in row.speeds:
        slow, middle, fast = (1 / s for s in (speed.times.quartiles[1], speed.times.median, speed.times.quartiles[0]))
        # With auto systems compute in different precisions, so each figure says its own.
        cells.append(f"{middle:.3g} ({slow:.3g}-{fast:.3g}) {speed.precision}")
    cells.append(" / ".join(dict.fromkeys(_path(speed) for speed in row.speeds)))
    if row.training is not None:
        cells.append(f"{row.training.hours:,.0f} here, {row.training.precision}")
    else:
        cells.append("" if published is None else f"{published.train_hours:,g} V100")
    return (row.name, *cells)


def _path(speed: Speed) -> str:
    return "fast" if speed.is_fast else "PyTorch"


def _per_cent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}"


def _speed_cells(row: CardRow, speed: Speed, base: Speed, *, has_energy: bool) -> tuple[str, ...]:
    published = row.published
    cells = [""] * 2 if published is None else [f"{published.rate_batch1:g}", f"{published.rate_batch4:g}"]
    cells += [f"{1 / speed.times.median:.2f}", f"{speed.best_rate:.2f} ({speed.best_batch})"]
    cells += [milliseconds(seconds) for seconds in (speed.times.median, speed.times.p90, speed.times.p99)]
    cells.append("1" if speed is base else times_as(speed.times.over(base.times)))
    cells.append(_path(speed))
    cells.append("" if speed.peak_memory is None else f"{speed.peak_memory >> 20}")
    if has_energy:
        cells.append("" if speed.joules is None else f"{speed.joules.median:.1f}")
    return (row.name, speed.precision, *cells)


def measure_card(
    options: BenchOptions,
    models: Sequence[BenchModel],
    device: torch.device,
    listener: Listener,
    score: Scoring | None = None,
    training: Mapping[str, TrainingHours] | None = None,
) -> CardSection:
    """Size, speed and memory of every model of ``options``; with ``score``, AP of those with trained weights.

    ``training``: hours of those whose step was timed, by name.
    """
    sizes = measure_sizes(options, models, listener).results
    pixels = random_pixels(options.size_hw, 1)
    subjects = {
        (model.name, asked): Subject(model, asked, device, pixels, listener)
        for model in models
        for asked in options.precisions
    }
    meter = EnergyMeter()
    energies: dict[str, list[float]] = {}
    runs = {_label(*key): _metered(subject.run, _label(*key), meter, energies) for key, subject in subjects.items()}
    listener.expect(len(runs) * (options.warmup + options.rounds))
    time_interleaved(runs, options.warmup, on_run=listener.ran)
    energies.clear()
    times = time_interleaved(runs, options.rounds, on_run=listener.ran)
    rows = []
    for model, size in zip(models, sizes, strict=True):
        speeds = []
        for asked in options.precisions:
            subject, label = subjects[model.name, asked], _label(model.name, asked)
            batch, best = _best_batch(model, asked, device, options, listener, times[label])
            joules = Samples(tuple(energies[label])) if meter.is_available else None
            peak = _peak_memory(model, asked, device, options)
            is_fast = subject.predictor.fast is not None
            speeds.append(Speed(subject.precision, is_fast, times[label], batch, best, peak, joules))
        metrics = None
        if score is not None and model.weights != RANDOM_WEIGHTS:
            metrics = score(model, options.precisions[0], device)
        hours = None if training is None else training.get(model.name)
        rows.append(CardRow(model.name, model.weights, size, tuple(speeds), metrics, hours))
    return CardSection(options.size_hw, device.type, tuple(rows))


def _label(name: str, precision: str) -> str:
    return f"{name}, {precision}"


def _metered(
    run: Callable[[], object], label: str, meter: EnergyMeter, energies: dict[str, list[float]]
) -> Callable[[], object]:
    """``run``, whose joules are noted under ``label``."""

    def metered() -> object:
        meter.take()
        result = run()
        energies.setdefault(label, []).append(meter.take())
        return result

    return metered if meter.is_available else run


def _best_batch(
    model: BenchModel,
    precision: str,
    device: torch.device,
    options: BenchOptions,
    listener: Listener,
    alone: Samples,
) -> tuple[int, Samples]:
    """The batch, of 1, 2, 4 ..., at which most images are done in a second, and the seconds it takes."""
    best = (1, alone)
    if device.type == "cpu":  # there every image runs alone
        return best
    batch = 1
    while (batch := 2 * batch) <= LARGEST_BATCH:
        try:
            subject = Subject(model, precision, device, random_pixels(options.size_hw, batch), listener)
            for _ in range(options.warmup):
                subject.run()
            times = time_interleaved({"": subject.run}, max(3, options.rounds // 2))[""]
        except (torch.OutOfMemoryError, DeviceError):
            break
        if subject.predictor.batch_size < batch:  # it did not fit, and was run in halves
            break
        if best[1].median / best[0] < WORTHWHILE * times.median / batch:
            break
        best = (batch, times)
    return best


def _peak_memory(model: BenchModel, precision: str, device: torch.device, options: BenchOptions) -> int | None:
    if device.type == "cpu":
        return peak_process_memory(model.name, options.size_hw, precision, torch.get_num_threads())
    subject = Subject(model, precision, device, random_pixels(options.size_hw, 1), Silence())
    torch.cuda.reset_peak_memory_stats(device)
    others = torch.cuda.memory_allocated(device) - sum(p.nbytes for p in model.model.parameters())
    subject.run()
    return torch.cuda.max_memory_allocated(device) - others
