"""How long the models take, from prepared pictures to detections, in each precision, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddetr_cli.bench.options import LATENCY, BenchOptions
from ddetr_cli.bench.subjects import BenchModel, Subject, random_pixels, weights_name
from ddetr_cli.bench.tables import Listener, Table, middle_half, milliseconds
from ddetr_cli.bench.timing import Samples, noise_notes, time_interleaved

LATENCY_CONVENTION = "model and post-processing of one batch, normalised pixels to detections on the CPU"


@dataclass(frozen=True)
class LatencyResult:
    """One model in one precision."""

    name: str
    preset: str
    weights: str
    asked: str  # the precision on the command line
    precision: str
    times: Samples  # seconds of one batch
    peak_device_memory: int | None  # bytes, CUDA only


@dataclass(frozen=True)
class LatencySection:
    """Latencies of all models and precisions."""

    batch_size: int
    results: tuple[LatencyResult, ...]
    key: str = LATENCY

    def images_per_second(self, result: LatencyResult) -> float:
        """At the median latency."""
        return self.batch_size / result.times.median

    def to_json(self) -> list[dict[str, Any]]:
        """One object per model and precision; seconds of one batch."""
        return [
            {
                "name": result.name,
                "preset": result.preset,
                "weights": result.weights,
                "precision": result.precision,
                "asked_precision": result.asked,
                "seconds": result.times.to_json(),
                "images_per_second": self.images_per_second(result),
                "peak_device_memory_bytes": result.peak_device_memory,
            }
            for result in self.results
        ]

    def tables(self) -> list[Table]:
        """One row per model and precision."""
        rows = tuple(
            (
                result.name,
                weights_name(result.weights),
                f"auto: {result.precision}" if result.asked == "auto" else result.precision,
                milliseconds(result.times.median),
                middle_half(result.times),
                milliseconds(result.times.p90),
                milliseconds(result.times.smallest),
                f"{self.images_per_second(result):.2f}",
            )
            for result in self.results
        )
        headings = ("model", "weights", "precision", "median ms", "quartiles", "p90 ms", "min ms", "images/s")
        noise = noise_notes({f"{r.name} {r.precision}": r.times for r in self.results})
        return [Table("latency", headings, rows, labels=3, notes=(f"timed: {LATENCY_CONVENTION}", *noise))]


def measure_latency(
    options: BenchOptions, models: Sequence[BenchModel], device: torch.device, listener: Listener
) -> LatencySection:
    """Time every model in every precision of ``options``. Raises DeviceError."""
    pixels = random_pixels(options.size_hw, options.batch_size)
    subjects = [
        Subject(model, precision, device, pixels, listener) for model in models for precision in options.precisions
    ]
    listener.expect(len(subjects) * (options.warmup + options.rounds))
    peaks = []
    for subject in subjects:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(options.warmup):
            subject.run()
            listener.ran()
        peaks.append(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)
    runs = {f"{subject.model.name}, {subject.asked}": subject.run for subject in subjects}
    times = time_interleaved(runs, options.rounds, on_run=listener.ran)
    return LatencySection(
        options.batch_size,
        tuple(
            LatencyResult(
                subject.model.name,
                subject.model.config.preset,
                subject.model.weights,
                subject.asked,
                subject.precision,
                samples,
                peak,
            )
            for subject, samples, peak in zip(subjects, times.values(), peaks, strict=True)
        ),
    )
