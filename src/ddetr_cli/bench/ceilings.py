"""What this machine can do at best, measured beside the models: no model can be faster than its floor.

The floor of a model is its multiply-adds at the rate of the best convolution, PyTorch's or that of the engine which
inference runs on here, and its deformable attention in the encoder at the rate of the kernel on a value that fits
into the nearest cache. That is what the time would be if every part ran as fast as the best one, and memory cost
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ddetr_cli.bench.flops import ModelSize
from ddetr_cli.bench.op_cases import DTYPES, level_sizes
from ddetr_cli.bench.tables import Table, middle_half, milliseconds
from ddetr_cli.bench.timing import Samples
from ddetr_cli.ops import msda
from ddetr_cli.ops.dense import Map, dense_engine, huge_buffer
from ddetr_cli.presets import DEFORMABLE_DETR, ModelConfig

# The 3x3 convolutions of ResNet-50's last three stages in a picture of 800x1333: channels, height, width.
CONVOLUTIONS = ((128, 100, 167), (256, 50, 84), (512, 25, 42))
PYTORCH = "PyTorch"
# Maps whose whole value, one head of it, fits into any first-level cache.
NEAR_MAPS = (6, 6, 4, 4, 3, 3, 2, 2)
COPY_BYTES = 256 << 20


@dataclass(frozen=True)
class Ceilings:
    """Times of the probes; keys are what was run, as ``ceiling_probes`` names it."""

    size_hw: tuple[int, int]
    times: dict[str, Samples]

    def peak(self, precision: str) -> float:
        """Multiply-adds per second of the best convolution in ``precision``."""
        return 1 / self._best(precision)[1].median

    def peak_of(self, precision: str) -> str:
        """Whose convolution that is: PyTorch's, or an engine of ours by its name."""
        return self._best(precision)[0].split(", ")[1]

    def _best(self, precision: str, by: str = "") -> tuple[str, Samples]:
        """The best convolution's name, and its seconds per multiply-add."""
        seconds = {
            name: samples.scaled(1 / _convolution_flops(shape))
            for shape in CONVOLUTIONS
            for name, samples in self.times.items()
            if name.startswith(_convolution_name(shape, by)) and name.endswith(f" {precision}")
        }
        return min(seconds.items(), key=lambda named: named[1].median)

    def floor(self, config: ModelConfig, size: ModelSize, precision: str, by: str = "") -> Samples:
        """Seconds, round by round, that a model of ``size`` (counted at the same picture size) cannot be faster than.

        ``by``: PYTORCH for the rate of its convolutions alone.
        """
        floor = self._best(precision, by)[1].scaled(size.flops - size.flops_by_operation["deformable"])
        if config.family == DEFORMABLE_DETR:
            op = self.times[_msda_name(config, precision)].scaled(config.encoder_layers)
            floor = Samples(tuple(a + b for a, b in zip(floor.values, op.values, strict=True)))
        return floor

    @property
    def copy_rate(self) -> float:
        """Bytes per second read and written while copying memory that is there already."""
        return 2 * COPY_BYTES / self.times["copy"].median

    @property
    def fresh_rate(self) -> float:
        """Bytes per second while filling memory that comes from the system."""
        return COPY_BYTES / self.times["fill fresh memory"].median

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; rates per second, a multiply-add counted once."""
        precisions = sorted({name.split()[-1] for name in self.times if name.startswith("convolution")})
        return {
            "peak_flops": {precision: self.peak(precision) for precision in precisions},
            "peak_by": {precision: self.peak_of(precision) for precision in precisions},
            "copy_bytes_per_s": self.copy_rate,
            "fresh_bytes_per_s": self.fresh_rate,
            "probes": {name: samples.to_json() for name, samples in self.times.items()},
        }

    def table(self) -> Table:
        """One row per probe."""
        rows = []
        for name, samples in self.times.items():
            if name.startswith("convolution"):
                shape = next(s for s in CONVOLUTIONS if name.startswith(_convolution_name(s, "")))
                rate = f"{_convolution_flops(shape) / samples.median / 1e9:.0f} G multiply-adds/s"
            elif name == "copy":
                rate = f"{self.copy_rate / 1e9:.1f} GB/s"
            elif name == "fill fresh memory":
                rate = f"{self.fresh_rate / 1e9:.1f} GB/s"
            else:
                rate = "one encoder layer"
            rows.append((name, milliseconds(samples.median), middle_half(samples), rate))
        return Table("ceilings of this machine", ("probe", "median ms", "quartiles", "rate"), tuple(rows))


def ceiling_probes(
    size_hw: tuple[int, int], configs: list[ModelConfig], precisions: list[str], batch_size: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Calls that reach the ceilings, for models of ``configs``; to be timed in the same rounds as the models."""
    probes: dict[str, Callable[[], object]] = {}
    for precision in precisions:
        dtype = DTYPES[precision]
        for shape in CONVOLUTIONS:
            channels, height, width = shape
            image = torch.randn(1, channels, height, width, device=device)
            kernel = torch.randn(channels, channels, 3, 3, device=device)
            probes[f"{_convolution_name(shape, PYTORCH)}, {precision}"] = _convolution(image, kernel, dtype)
            if device.type == "cpu":
                probes |= _own_convolution(shape, kernel, precision)
        for config in configs:
            if config.family == DEFORMABLE_DETR and _msda_name(config, precision) not in probes:
                probes[_msda_name(config, precision)] = _near_msda(size_hw, config, dtype, batch_size, device)
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    probes["copy"] = lambda: target.copy_(source)
    probes["fill fresh memory"] = lambda: torch.empty(COPY_BYTES // 4, device=device).fill_(1.0)
    return probes


def _convolution(image: torch.Tensor, kernel: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    image, kernel = (tensor.to(dtype, memory_format=torch.channels_last) for tensor in (image, kernel))
    return lambda: F.conv2d(image, kernel, padding=1)


def _own_convolution(
    shape: tuple[int, int, int], kernel: torch.Tensor, precision: str
) -> dict[str, Callable[[], object]]:
    """The same on the engine that inference runs on, from and to memory that is there already; {} without one."""
    engine = dense_engine(DTYPES[precision]) if DTYPES[precision] in (torch.float32, torch.bfloat16) else None
    if engine is None:
        return {}
    channels, height, width = shape
    source = torch.randn(height + 2, width + 2, channels).to(engine.dtype)
    target = torch.empty(height, width, channels, dtype=engine.dtype)
    threads = torch.get_num_threads()
    scratch = huge_buffer(threads * engine.scratch_bytes(256, 1024))
    convolution = engine.convolution(
        engine.crew(threads, scratch),
        engine.pack(kernel, None),
        Map(source[1:, 1:].data_ptr(), height, width, channels, border=1),
        Map(target.data_ptr(), height, width, channels),
        padding=1,
    )

    def run(_kept: object = (source, target, scratch)) -> None:
        convolution()

    return {f"{_convolution_name(shape, engine.name)}, {precision}": run}


def _near_msda(
    size_hw: tuple[int, int], config: ModelConfig, dtype: torch.dtype, batch_size: int, device: torch.device
) -> Callable[[], object]:
    """The op with as many queries as the encoder of ``config`` has, on a value that stays in the nearest cache."""
    level_hw = level_sizes(size_hw, config.levels)
    maps = list(NEAR_MAPS[: 2 * config.levels])
    queries, positions = (sum(h * w for h, w in zip(hw[::2], hw[1::2], strict=True)) for hw in (level_hw, maps))
    M, D = config.heads, config.hidden_dim // config.heads
    value = torch.randn(batch_size, positions, M, D, device=device).to(dtype)
    sampling_xy = torch.rand(batch_size, queries, M, config.levels, config.points, 2, device=device)
    weights = torch.rand(batch_size, queries, M, config.levels, config.points, device=device)
    return lambda: msda(value, maps, sampling_xy, weights)


def _convolution_name(shape: tuple[int, int, int], by: str) -> str:
    channels, height, width = shape
    return f"convolution 3x3 {channels}x{height}x{width}, {by}"


def _convolution_flops(shape: tuple[int, int, int]) -> int:
    channels, height, width = shape
    return 9 * channels * channels * height * width


def _msda_name(config: ModelConfig, precision: str) -> str:
    channels = config.hidden_dim // config.heads
    return f"op on a cached value, {config.levels} levels of {config.heads}x{channels} {precision}"
