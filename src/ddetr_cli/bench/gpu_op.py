"""The op on a GPU: ceilings first, then every kernel against float64, then the times of those that are right.

Device time, by replay of CUDA graphs in turns; every call of a sample has inputs of its own, so that no cache holds
more than in a model. Beside each time stands the least the device's memory allows: every input read and every output
written once at the measured rate of a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddetr_cli.bench.gpu_ceilings import GpuCeilings, measure_ceilings
from ddetr_cli.bench.gpu_kernels import Candidate, backward_candidates, forward_candidates, our_kernels
from ddetr_cli.bench.gpu_replay import Replay, take_turns
from ddetr_cli.bench.op import BACKWARD, FORWARD
from ddetr_cli.bench.op_cases import DTYPES, POINTS, SHAPES, OpInput, make_input
from ddetr_cli.bench.options import OP, BenchOptions
from ddetr_cli.bench.tables import Listener, Table, middle_half, milliseconds, times_as
from ddetr_cli.bench.timing import Samples, noise_notes
from ddetr_cli.ops import reference
from ddetr_cli.ops.native_cuda import CudaKernels

# Relative to float64, by norm: what one rounding of the result, and locations in float32, leave. Larger is wrong.
LARGEST_ERROR = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1e-2}
_INPUTS = 3  # that take turns within a sample


@dataclass(frozen=True)
class GpuResult:
    """One candidate in one case; ``times`` and ``speedup`` are None where it was wrong or failed, ``reason`` why."""

    direction: str
    shape: str
    points: str
    name: str
    dtype: str
    error: float | None
    floor: float  # seconds that memory alone takes
    times: Samples | None = None
    speedup: Samples | None = None  # over the plain kernels in fp32, within rounds
    reason: str = ""


@dataclass(frozen=True)
class GpuOpSection:
    """All cases at one picture size."""

    size_hw: tuple[int, int]
    batch_size: int
    ceilings: GpuCeilings
    results: tuple[GpuResult, ...]
    key: str = OP

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; seconds of one call on the device."""
        return {
            "ceilings": self.ceilings.to_json(),
            "cases": [
                {
                    "direction": r.direction,
                    "shape": r.shape,
                    "points": r.points,
                    "kernels": r.name,
                    "dtype": r.dtype,
                    "error": r.error,
                    "floor_seconds": r.floor,
                    "seconds": None if r.times is None else r.times.to_json(),
                    "speedup": None if r.speedup is None else r.speedup.to_json(),
                    "reason": r.reason,
                }
                for r in self.results
            ],
        }

    def tables(self) -> list[Table]:
        """The ceilings, then one table per case."""
        cases = dict.fromkeys((r.direction, r.shape, r.points) for r in self.results)
        tables = [self.ceilings.table(), *(self._table(*case) for case in cases)]
        note = (
            "faster by: than the plain kernels in fp32, median and quartiles of the rounds' ratios; least: inputs "
            "and outputs once through memory; error: to float64, by norm. Not timed: what failed or was wrong"
        )
        return [*tables[:-1], replace(tables[-1], notes=(*tables[-1].notes, note))]

    def _table(self, direction: str, shape: str, points: str) -> Table:
        results = [r for r in self.results if (r.direction, r.shape, r.points) == (direction, shape, points)]
        height, width = self.size_hw
        return Table(
            f"op {direction} on the device, {shape} of {height}x{width}, {points} points, batch {self.batch_size}",
            ("kernels", "value", "median ms", "quartiles", "least ms", "faster by", "error"),
            tuple(_row(result) for result in results),
            labels=2,
            notes=noise_notes({f"{r.name} {r.dtype}": r.times for r in results if r.times is not None}),
        )


def _row(r: GpuResult) -> tuple[str, ...]:
    error = "-" if r.error is None else f"{r.error:.0e}"
    if r.times is None or r.speedup is None:
        return (r.name, r.dtype, "-", r.reason, milliseconds(r.floor), "-", error)
    times = (milliseconds(r.times.median), middle_half(r.times), milliseconds(r.floor), times_as(r.speedup))
    return (r.name, r.dtype, *times, error)


def measure_gpu_op(
    options: BenchOptions, device: torch.device, listener: Listener, kernels: CudaKernels | None = None
) -> GpuOpSection:
    """Time the op in the shapes of r50 at ``options.size_hw``; ``kernels``: others than the installed ones."""
    kernels = our_kernels(device) if kernels is None else kernels
    ceilings = measure_ceilings(device, options.rounds)
    dtypes = tuple(DTYPES) if "auto" in options.precisions else options.precisions
    results: list[GpuResult] = []
    for direction in (FORWARD, BACKWARD):
        candidates = forward_candidates(device, kernels) if direction == FORWARD else backward_candidates(kernels)
        for shape in SHAPES:
            for points in POINTS:
                problem = make_input(shape, points, options.size_hw, options.batch_size, device)
                case = _Case(direction, shape, points, problem, ceilings.copy_rate, device)
                results += case.measure(candidates, dtypes, options.rounds, listener)
    return GpuOpSection(options.size_hw, options.batch_size, ceilings, tuple(results))


@dataclass(frozen=True)
class _Case:
    direction: str
    shape: str
    points: str
    problem: OpInput
    copy_rate: float
    device: torch.device

    def measure(
        self, candidates: Sequence[Candidate], dtypes: Sequence[str], rounds: int, listener: Listener
    ) -> list[GpuResult]:
        """Check all, then time those that are right; the first candidate in fp32 is what others are compared with."""
        replays: dict[str, Replay] = {}
        found = [
            self._check(candidate, dtype, replays, listener)
            for candidate in candidates
            for dtype in candidate.dtypes
            if dtype in dtypes or (candidate is candidates[0] and dtype == "fp32")
        ]
        listener.expect(len(replays) * rounds)
        times = take_turns(replays, rounds, listener.ran)
        base = times.get(f"{candidates[0].name} fp32")

        def with_times(result: GpuResult) -> GpuResult:
            own = times.get(f"{result.name} {result.dtype}")
            return result if own is None or base is None else replace(result, times=own, speedup=base.over(own))

        return [with_times(result) for result in found]

    def _check(self, candidate: Candidate, dtype: str, replays: dict[str, Replay], listener: Listener) -> GpuResult:
        value, grad_output = (t.to(DTYPES[dtype]) for t in (self.problem.value, self.problem.grad_output))
        problem = replace(self.problem, value=value, grad_output=grad_output)
        result = GpuResult(
            self.direction,
            self.shape,
            self.points,
            candidate.name,
            dtype,
            None,
            self._bytes(problem) / self.copy_rate,
        )
        name = f"{candidate.name} {dtype}"
        try:
            with torch.no_grad():
                error = _error(candidate.prepare(problem)(), self._expected(problem))
                if not error <= LARGEST_ERROR[dtype]:
                    return replace(result, error=error, reason="wrong")
                inputs = [problem, *(_copy(problem) for _ in range(_INPUTS - 1))]
                replays[name] = Replay([candidate.prepare(one) for one in inputs], self.device)
            return replace(result, error=error)
        except Exception as failure:  # others' kernels refuse sizes and types in ways of their own
            why = str(failure).strip().splitlines() or [type(failure).__name__]
            listener.notice(f"{name}: {why[0]}")
            return replace(result, reason="failed")

    def _expected(self, problem: OpInput) -> tuple[Tensor, ...]:
        """The results of ``problem``, whose numbers are rounded to its dtype, in float64."""
        value, xy = problem.value.double(), problem.sampling_xy.double()
        weights = problem.weights.double()
        if self.direction == FORWARD:
            return (reference.msda_forward(value, problem.level_hw, xy, weights),)
        return reference.msda_backward(problem.grad_output.double(), value, problem.level_hw, xy, weights)

    def _bytes(self, problem: OpInput) -> int:
        """What is read or written at least once: of the fused form forward, of the plain one backward."""
        if self.direction == FORWARD:
            return sum(
                t.nbytes for t in (problem.value, problem.projected, problem.reference_xy, problem.grad_output)
            )
        samples = problem.sampling_xy.nbytes + problem.logits.nbytes
        return 2 * (problem.value.nbytes + samples) + problem.grad_output.nbytes


def _copy(problem: OpInput) -> OpInput:
    tensors: dict[str, Any] = {n: t.clone() for n, t in vars(problem).items() if isinstance(t, Tensor)}
    return replace(problem, **tensors)


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest error by norm of any result but the gradient of the locations, which jumps at the edges of pixels."""
    pairs = [(a.double(), b) for i, (a, b) in enumerate(zip(found, expected, strict=True)) if i != 1]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
