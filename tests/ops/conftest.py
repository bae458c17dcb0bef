"""One table of cases for every implementation of the op, and the implementations.

B batch, Q queries, S positions over all levels, M heads, L levels, P points, D channels per head
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddetr_cli.ops import kernels, native, native_cuda, reference

# The emulated ones are the CUDA kernels themselves, on the CPU. "fast" is one of the two after it in ``KERNELS``.
CUDA_KINDS = [name for name in native_cuda.KERNELS if name != "fast"]
IMPLEMENTATIONS = (
    "reference",
    "native-portable",
    "native-avx2",
    "native-avx512",
    *(f"cuda-{name}" for name in CUDA_KINDS),
    *(pytest.param(f"emulated-{name}", marks=pytest.mark.slow) for name in CUDA_KINDS),
)


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device on which the op is computed by the implementation that the parameter names."""
    name = request.param
    kind, _, part = name.partition("-")
    if kind == "cuda":
        request.getfixturevalue("require_cuda")
        gpu, cuda = torch.device("cuda", 0), native_cuda.cuda_kernels()
        assert cuda is not None
        monkeypatch.setitem(kernels._BY_DEVICE, gpu, replace(cuda, kernels=part))
        return gpu
    cpu = torch.device("cpu")
    if kind == "emulated":
        emulated = request.getfixturevalue("emulated")
        monkeypatch.setitem(kernels._BY_DEVICE, cpu, replace(emulated, kernels=part))
        return cpu
    if name == "reference":
        monkeypatch.setitem(kernels._BY_DEVICE, cpu, kernels.ReferenceKernels())
        return cpu
    request.getfixturevalue("require_native")
    installed = native.cpu_kernels()
    assert installed is not None
    if installed.library.ddetr_cpu_isa(native._ISAS[part]) < 0:
        pytest.skip(f"this processor or this build has no {part}")
    monkeypatch.setitem(kernels._BY_DEVICE, cpu, replace(installed, isa=part))
    return cpu


@pytest.fixture
def emulated(emulated_cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> native_cuda.CudaKernels:
    """The CUDA kernels on the CPU, for tensors there."""
    monkeypatch.setattr(native_cuda, "device_and_stream", lambda tensor: (0, 0))
    library = native.load(emulated_cuda_library, native_cuda.PROTOTYPES)
    for name in ("emulated_order", "emulated_processors"):
        getattr(library, name).argtypes = [ctypes.c_int]
    library.emulated_launches.restype = ctypes.c_uint64
    library.emulated_order(0)
    library.emulated_processors(132)
    return native_cuda.CudaKernels(emulated_cuda_library, library)


@dataclass(frozen=True)
class Case:
    """Sizes of a problem; ``low`` and ``high`` bound the random locations."""

    level_hw: tuple[tuple[int, int], ...] = ((6, 4), (3, 5))
    batch: int = 2
    queries: int = 5
    heads: int = 2
    points: int = 4
    channels: int = 8
    low: float = -0.25
    high: float = 1.25

    @property
    def flat_hw(self) -> list[int]:
        return [size for pair in self.level_hw for size in pair]

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[int], Tensor, Tensor]:
        """value, level_hw, sampling_xy, weights; numbers of order 1, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        real = reference.accumulate_dtype(dtype)
        positions, levels = sum(h * w for h, w in self.level_hw), len(self.level_hw)
        sizes = (self.batch, self.queries, self.heads, levels, self.points)
        value = torch.randn(self.batch, positions, self.heads, self.channels, generator=generator, dtype=real)
        xy = torch.rand(*sizes, 2, generator=generator, dtype=real) * (self.high - self.low) + self.low
        weights = torch.rand(*sizes, generator=generator, dtype=real) - 0.3
        return value.to(dtype), self.flat_hw, xy, weights


CASES = {
    "plain": Case(),
    "one head": Case(heads=1),
    "eight heads": Case(heads=8, channels=4),
    "sixteen heads": Case(heads=16, channels=2),
    "one level": Case(level_hw=((5, 7),)),
    "eight levels": Case(level_hw=tuple((level + 1, 9 - level) for level in range(8)), queries=3),
    "one point": Case(points=1),
    "eight points": Case(points=8),
    "more points than a block": Case(points=40, queries=2),
    "more points than are located at once": Case(points=300, queries=2, channels=33),
    "as many points as a vector has lanes": Case(level_hw=((6, 4), (3, 5), (2, 2), (1, 1)), channels=32),
    "more queries than are located at once": Case(queries=21, channels=16),
    "so few queries that value is read where it lies": Case(level_hw=((40, 30),), queries=2, channels=32),
    "1x1 level": Case(level_hw=((1, 1),)),
    "1xN and Nx1 levels": Case(level_hw=((1, 9), (7, 1))),
    "one channel": Case(channels=1),
    "3 channels": Case(channels=3),
    "16 channels": Case(channels=16),
    "30 channels": Case(channels=30),
    "31 channels": Case(channels=31),
    "32 channels": Case(channels=32),
    "33 channels": Case(channels=33),
    "64 channels": Case(channels=64, queries=2),
    "71 channels": Case(channels=71, queries=2),
    "1025 channels": Case(channels=1025, batch=1, queries=2, heads=1, points=1),
    "2048 channels": Case(channels=2048, batch=1, queries=1, heads=1, points=1),
    "3096 channels": Case(channels=3096, batch=1, queries=1, heads=1, points=1),
    "as many queries as positions": Case(level_hw=((20, 27), (10, 13)), batch=1, queries=670, heads=1, channels=16),
    "batch 65": Case(batch=65, queries=2, channels=3),
    "all points outside": Case(low=1.6, high=3.0),
    "no queries": Case(queries=0),
    "batch 0": Case(batch=0),
    "no points": Case(points=0),
    "no levels": Case(level_hw=()),
    "no heads": Case(heads=0),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    result: Case = request.param
    return result


@pytest.fixture
def plain() -> Case:
    return CASES["plain"]


@pytest.fixture
def fresh_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are chosen and libraries loaded anew within the test, and again after it."""
    monkeypatch.setattr(kernels, "_BY_DEVICE", {})
    native._load_cpu.cache_clear()
    native_cuda._load.cache_clear()
    yield
    native._load_cpu.cache_clear()
    native_cuda._load.cache_clear()
