"""How the time of a picture grows with its area, with the queries and with the levels, and the exponent of that.

Deformable attention costs each position the same however many there are, so the time is linear in the pixels; DETR's
attention looks from every position at every other, which grows with their square (arXiv:2010.04159, section 3 and
appendix A.1). The exponent b of time = a * pixels^b is fitted by least squares on logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ddetr_cli.bench.flops import measure_size
from ddetr_cli.bench.options import SCALING, BenchOptions
from ddetr_cli.bench.subjects import RANDOM_WEIGHTS, BenchModel, Subject, random_model, random_pixels
from ddetr_cli.bench.tables import Listener, Table, middle_half, milliseconds
from ddetr_cli.bench.timing import Samples, noise_notes, time_interleaved
from ddetr_cli.errors import UsageError
from ddetr_cli.presets import DEFORMABLE_DETR, ModelConfig

AREA, QUERIES, LEVELS = "pixels", "queries", "levels"

# The shares of the picture's area at which is measured; sides are rounded to what every map divides without a rest.
AREA_SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
SIDE_STEP = 64
QUERY_COUNTS = (100, 300, 900)
LEVEL_COUNTS = (1, 3, 4)  # one is the last map alone, three are those of the trunk


@dataclass(frozen=True)
class Point:
    """One model at one value of what grows; ``flops`` of one picture."""

    value: int
    times: Samples
    flops: int


@dataclass(frozen=True)
class Exponent:
    """The slope of a straight line through logarithms, and its standard error (None for two points: they fit)."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.error is None else f"{self.value:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Curve:
    """One model while ``quantity`` grows and everything else stays."""

    model: str
    precision: str
    quantity: str
    points: tuple[Point, ...]

    @property
    def time_exponent(self) -> Exponent:
        """Of the median times."""
        return fit_exponent([point.value for point in self.points], [point.times.median for point in self.points])

    @property
    def last_exponent(self) -> Exponent:
        """Of the times between the two largest."""
        last = self.points[-2:]
        return fit_exponent([point.value for point in last], [point.times.median for point in last])

    @property
    def flops_exponent(self) -> Exponent:
        """Of the multiply-adds."""
        return fit_exponent([point.value for point in self.points], [point.flops for point in self.points])


@dataclass(frozen=True)
class ScalingSection:
    """All curves."""

    curves: tuple[Curve, ...]
    key: str = SCALING

    def to_json(self) -> list[dict[str, Any]]:
        """One object per curve; seconds of one picture."""
        return [
            {
                "name": curve.model,
                "precision": curve.precision,
                "quantity": curve.quantity,
                "points": [
                    {curve.quantity: point.value, "seconds": point.times.to_json(), "flops": point.flops}
                    for point in curve.points
                ],
                "time_exponent": vars(curve.time_exponent),
                "flops_exponent": vars(curve.flops_exponent),
            }
            for curve in self.curves
        ]

    def tables(self) -> list[Table]:
        """The points, and the exponents of what grows with the picture."""
        points = tuple(
            (
                curve.model,
                curve.precision,
                f"{point.value} {curve.quantity}",
                milliseconds(point.times.median),
                middle_half(point.times),
                f"{point.flops / 1e9:.1f}",
            )
            for curve in self.curves
            for point in curve.points
        )
        exponents = tuple(
            (
                curve.model,
                curve.precision,
                str(curve.time_exponent),
                str(curve.last_exponent),
                str(curve.flops_exponent),
            )
            for curve in self.curves
            if curve.quantity == AREA
        )
        noise = noise_notes(
            {
                f"{curve.model} {point.value} {curve.quantity}": point.times
                for curve in self.curves
                for point in curve.points
            }
        )
        return [
            Table(
                "time against pixels, queries and levels",
                ("model", "precision", "at", "median ms", "quartiles", "GFLOPs"),
                points,
                labels=3,
                notes=noise,
            ),
            Table(
                "exponents: time = a * pixels^b",
                ("model", "precision", "b of time", "b between the two largest", "b of FLOPs"),
                exponents,
                labels=2,
                notes=("least squares on logarithms, with standard errors; 1: linear in the picture's area",),
            ),
        ]


def measure_scaling(
    options: BenchOptions, models: Sequence[BenchModel], device: torch.device, listener: Listener
) -> ScalingSection:
    """Time every model of ``options`` at several areas, the deformable presets also at several queries and levels.

    Raises UsageError where the picture is too small to be made eight times smaller, and DeviceError.
    """
    sizes = scaled_sizes(options.size_hw)
    curves = [
        _measure(model.name, precision, AREA, {h * w: (model, (h, w)) for h, w in sizes}, options, device, listener)
        for model in models
        for precision in options.precisions
    ]
    for model in models:
        # Trained weights belong to their number of levels and queries; and boxes of a first stage are the queries.
        if model.weights != RANDOM_WEIGHTS or model.config.family != DEFORMABLE_DETR or model.config.two_stage:
            continue
        for precision in options.precisions:
            variants = {n: replace(model.config, queries=n) for n in QUERY_COUNTS}
            curves.append(_measure_variants(model, precision, QUERIES, variants, options, device, listener))
            variants = {n: replace(model.config, levels=n) for n in LEVEL_COUNTS if n <= model.config.levels}
            if len(variants) > 1:
                curves.append(_measure_variants(model, precision, LEVELS, variants, options, device, listener))
    return ScalingSection(tuple(curves))


def scaled_sizes(size_hw: tuple[int, int]) -> list[tuple[int, int]]:
    """(h, w) of the areas that are measured, smallest first. Raises UsageError where two of them are the same."""
    sizes = [
        (_rounded(size_hw[0] * math.sqrt(share)), _rounded(size_hw[1] * math.sqrt(share))) for share in AREA_SHARES
    ]
    if len({h * w for h, w in sizes}) < len(sizes):
        raise UsageError(f"--image-size {size_hw[0]}x{size_hw[1]}: too small to scale down. Give 256 or more.")
    return sizes


def _rounded(side: float) -> int:
    return max(1, round(side / SIDE_STEP)) * SIDE_STEP


def fit_exponent(values: Sequence[float], times: Sequence[float]) -> Exponent:
    """b of times = a * values^b, by least squares on logarithms; two values or more."""
    xs, ys = [math.log(value) for value in values], [math.log(time) for time in times]
    count = len(xs)
    mean_x, mean_y = sum(xs) / count, sum(ys) / count
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    if count == 2:
        return Exponent(slope, None)
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return Exponent(slope, math.sqrt(rest / (count - 2) / spread))


def _measure_variants(
    model: BenchModel,
    asked: str,
    quantity: str,
    configs: Mapping[int, ModelConfig],
    options: BenchOptions,
    device: torch.device,
    listener: Listener,
) -> Curve:
    """The model of each configuration, at the same size."""
    variants = {n: (random_model(model.name, config), options.size_hw) for n, config in configs.items()}
    return _measure(model.name, asked, quantity, variants, options, device, listener)


def _measure(
    name: str,
    asked: str,
    quantity: str,
    variants: Mapping[int, tuple[BenchModel, tuple[int, int]]],
    options: BenchOptions,
    device: torch.device,
    listener: Listener,
) -> Curve:
    subjects = {
        value: Subject(model, asked, device, random_pixels(size_hw, 1), listener)
        for value, (model, size_hw) in variants.items()
    }
    runs = {str(value): subject.run for value, subject in subjects.items()}
    listener.expect(len(runs) * (options.warmup + options.rounds))
    time_interleaved(runs, options.warmup, on_run=listener.ran)
    times = time_interleaved(runs, options.rounds, on_run=listener.ran)
    points = tuple(
        Point(value, times[str(value)], measure_size(model.model, size_hw).flops)
        for value, (model, size_hw) in variants.items()
    )
    return Curve(name, next(iter(subjects.values())).precision, quantity, points)
