"""The op on its own: every kernel and dtype there is, both directions, against what others use.

A sample is one call with the arguments the model has, and the result in the layout it takes on: whatever a kernel
rearranges inside is part of its time. All candidates of one case take turns, so a ratio is made within rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddetr_cli import ops
from ddetr_cli.bench.op_cases import DTYPES, POINTS, SHAPES, Backend, OpInput, backends, baseline, make_input
from ddetr_cli.bench.options import OP, BenchOptions
from ddetr_cli.bench.tables import Listener, Table, middle_half, milliseconds, times_as
from ddetr_cli.bench.timing import Samples, noise_notes, time_interleaved, warm_up

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class OpResult:
    """One candidate in one case. ``error``: largest difference to the baseline, as a share of its largest value."""

    direction: str
    shape: str
    points: str
    backend: str
    dtype: str
    times: Samples
    speedup: Samples  # over the baseline, within rounds
    error: float


@dataclass(frozen=True)
class OpSection:
    """All cases at one picture size."""

    size_hw: tuple[int, int]
    batch_size: int
    baseline: str
    results: tuple[OpResult, ...]
    key: str = OP

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; seconds of one call."""
        return {
            "baseline": f"{self.baseline} fp32",
            "cases": [
                {
                    "direction": r.direction,
                    "shape": r.shape,
                    "points": r.points,
                    "backend": r.backend,
                    "dtype": r.dtype,
                    "seconds": r.times.to_json(),
                    "speedup": r.speedup.to_json(),
                    "error": r.error,
                }
                for r in self.results
            ],
        }

    def tables(self) -> list[Table]:
        """One table per case."""
        cases = dict.fromkeys((r.direction, r.shape, r.points) for r in self.results)
        tables = [self._table(*case) for case in cases]
        note = (
            f"faster by: than {self.baseline} in fp32, median and quartiles of the rounds' ratios; error: largest "
            "difference to it, as a share of its largest value; fused: softmax and locations are part of the time"
        )
        return [*tables[:-1], replace(tables[-1], notes=(*tables[-1].notes, note))]

    def _table(self, direction: str, shape: str, points: str) -> Table:
        height, width = self.size_hw
        results = [r for r in self.results if (r.direction, r.shape, r.points) == (direction, shape, points)]
        rows = tuple(
            (
                r.backend,
                r.dtype,
                milliseconds(r.times.median),
                middle_half(r.times),
                milliseconds(r.times.smallest),
                times_as(r.speedup),
                f"{r.error:.0e}",
            )
            for r in results
        )
        return Table(
            f"op {direction}, {shape} of {height}x{width}, {points} points, batch {self.batch_size}",
            ("backend", "value", "median ms", "quartiles", "min ms", "faster by", "error"),
            rows,
            labels=2,
            notes=noise_notes({f"{r.backend} {r.dtype}": r.times for r in results}),
        )


def measure_op(options: BenchOptions, device: torch.device, listener: Listener) -> OpSection:
    """Time the op in the shapes of r50 at ``options.size_hw``."""
    dtypes = DTYPES if "auto" in options.precisions else options.precisions
    results = []
    for direction, calls_of in ((FORWARD, _forwards), (BACKWARD, _backwards)):
        for shape in SHAPES:
            for points in POINTS:
                problem = make_input(shape, points, options.size_hw, options.batch_size, device)
                calls = calls_of(problem, [baseline(), *backends(device)])
                # The baseline is measured in any case.
                kept = dict.fromkeys([next(iter(calls)), *(name for name in calls if name[1] in dtypes)])
                calls = {name: calls[name] for name in kept}
                measured = _measure(calls, options, device, listener)
                results += [OpResult(direction, shape, points, *each) for each in measured]
    return OpSection(options.size_hw, options.batch_size, baseline().name, tuple(results))


Call = Callable[[], tuple[Tensor, ...]]
Name = tuple[str, str]  # backend and dtype


def _forwards(problem: OpInput, known: Sequence[Backend]) -> dict[Name, Call]:
    """Every forward there is, the baseline first."""
    level_hw, arguments = problem.level_hw, (problem.sampling_xy, problem.weights)
    msda_fused = getattr(ops, "msda_fused", None)
    if msda_fused is not None:
        fused = Backend(
            "ddetr fused",
            tuple(DTYPES),
            lambda value, *_: msda_fused(value, level_hw, problem.reference_xy, problem.projected),
            None,
        )
        known = [*known, fused]

    def call(backend: Backend, value: Tensor) -> Call:
        return lambda: (backend.forward(value, level_hw, *arguments),)

    return {
        (backend.name, dtype): call(backend, problem.value.to(DTYPES[dtype]))
        for backend in known
        for dtype in backend.dtypes
    }


def _backwards(problem: OpInput, known: Sequence[Backend]) -> dict[Name, Call]:
    """Every backward there is, the baseline first: gradients of values, locations and weights."""
    level_hw, arguments = problem.level_hw, (problem.sampling_xy, problem.weights)

    def call(backend: Backend, dtype: torch.dtype) -> Call:
        value, grad_output = problem.value.to(dtype), problem.grad_output.to(dtype)
        if backend.backward is not None:
            compute = backend.backward
            return lambda: compute(grad_output, value, level_hw, *arguments)
        inputs = [tensor.clone().requires_grad_() for tensor in (value, *arguments)]
        with torch.enable_grad():
            output = backend.forward(inputs[0], level_hw, inputs[1], inputs[2])
        return lambda: torch.autograd.grad(output, inputs, grad_output, retain_graph=True)

    return {(backend.name, dtype): call(backend, DTYPES[dtype]) for backend in known for dtype in backend.dtypes}


def _measure(
    calls: Mapping[Name, Call], options: BenchOptions, device: torch.device, listener: Listener
) -> Iterator[tuple[str, str, Samples, Samples, float]]:
    """Backend, dtype, times, ratios to the first of ``calls`` and error of each."""

    def waiting(call: Call) -> Call:
        def run() -> tuple[Tensor, ...]:
            result = call()
            torch.cuda.synchronize(device)
            return result

        return call if device.type == "cpu" else run

    runs = {" ".join(name): waiting(call) for name, call in calls.items()}
    with torch.no_grad():
        expected, *others = (call() for call in runs.values())
        errors = [0.0, *(_error(found, expected) for found in others)]
        del expected, others
        repeats = warm_up(runs, options.warmup)
        listener.expect(len(runs) * options.rounds)
        times = time_interleaved(runs, options.rounds, repeats=repeats, on_run=listener.ran)
    base = next(iter(times.values()))
    for (backend, dtype), samples, error in zip(calls, times.values(), errors, strict=True):
        yield backend, dtype, samples, base.over(samples), error


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference in any result but the gradient of the locations, which jumps at the edges of pixels."""
    pairs = [(a.float(), b) for i, (a, b) in enumerate(zip(found, expected, strict=True)) if i != 1]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
