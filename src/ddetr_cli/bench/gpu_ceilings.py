"""What a GPU can do at best with memory, caches, matrices and additions to memory: no kernel can be faster.

The probes are PyTorch's own kernels. Where a kernel of ours beats a probe, the probe was no ceiling, and both figures
should be looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ddetr_cli.bench.gpu_replay import Call, Replay, take_turns
from ddetr_cli.bench.tables import Table, middle_half, milliseconds
from ddetr_cli.bench.timing import Samples

COPY, MATRIX, CACHE, GATHER, REDUCE = "copy", "matrix product bf16", "cached read", "gather of rows", "adding of rows"


@dataclass(frozen=True)
class ProbeSizes:
    """How large the probes are; those of ``on`` fill a GPU, small ones serve tests."""

    copy_bytes: int
    matrix: int
    cached_bytes: int
    rows: int  # that lie in memory, 128 bytes each
    visits: int  # of them, at random

    @staticmethod
    def on(device: torch.device) -> ProbeSizes:
        if device.type != "cuda":
            return ProbeSizes(1 << 20, 128, 1 << 16, 1 << 10, 1 << 12)
        # 12 MB, an image's value in bf16, stays in the second-level cache of any GPU worth naming
        return ProbeSizes(1 << 30, 8192, 12 << 20, 89_000, 5_000_000)


@dataclass(frozen=True)
class GpuCeilings:
    """Times of the probes, and the rates that follow."""

    sizes: ProbeSizes
    times: dict[str, Samples]

    @property
    def copy_rate(self) -> float:
        """Bytes per second, read and written."""
        return 2 * self.sizes.copy_bytes / self.times[COPY].median

    def _rates(self) -> dict[str, tuple[float, str]]:
        sizes = self.sizes
        amounts = {
            COPY: (2.0 * sizes.copy_bytes, "B/s"),
            MATRIX: (2.0 * sizes.matrix**3, "FLOP/s"),
            CACHE: (float(sizes.cached_bytes), "B/s"),
            GATHER: (128.0 * sizes.visits, "B/s"),
            REDUCE: (128.0 * sizes.visits, "B/s"),
        }
        return {name: (amount / self.times[name].median, unit) for name, (amount, unit) in amounts.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; rates per second, a multiply-add counted twice."""
        return {
            name: {"rate": rate, "unit": unit, "seconds": self.times[name].to_json()}
            for name, (rate, unit) in self._rates().items()
        }

    def table(self) -> Table:
        """One row per probe."""
        rows = []
        for name, (rate, unit) in self._rates().items():
            times = self.times[name]
            rows.append((name, milliseconds(times.median), middle_half(times), f"{rate / 1e12:.3g} T{unit}"))
        return Table("ceilings of this device", ("probe", "median ms", "quartiles", "rate"), tuple(rows))


def measure_ceilings(device: torch.device, rounds: int) -> GpuCeilings:
    """Run the probes in turns."""
    sizes = ProbeSizes.on(device)
    with torch.inference_mode():
        replays = {name: Replay([call], device) for name, call in _probes(sizes, device).items()}
        return GpuCeilings(sizes, take_turns(replays, rounds))


def _probes(sizes: ProbeSizes, device: torch.device) -> dict[str, Call]:
    source = torch.randn(sizes.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(sizes.matrix, sizes.matrix, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    cached = torch.randn(sizes.cached_bytes // 4, device=device)
    total = torch.empty((), device=device)
    table = torch.randn(sizes.rows, 32, device=device)
    where = torch.randint(sizes.rows, (sizes.visits,), device=device)
    gathered = torch.empty(sizes.visits, 32, device=device)
    return {
        COPY: lambda: target.copy_(source),
        MATRIX: lambda: torch.mm(left, right, out=product),
        CACHE: lambda: torch.amax(cached, 0, out=total),
        # the result is written too, which this does not count: a lower bound
        GATHER: lambda: torch.index_select(table, 0, where, out=gathered),
        REDUCE: lambda: table.index_add_(0, where, gathered),
    }
