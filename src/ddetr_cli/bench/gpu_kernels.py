"""Everyone who can compute the op on a GPU here: each kind of kernels of ours, PyTorch's grid_sample, and others'.

Our plain kernels stand for the mapping that most public CUDA kernels have had since 2020: a thread for every channel
of every query.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddetr_cli.bench.op_cases import DTYPES, Backend, OpInput, baseline
from ddetr_cli.ops import native_cuda, reference
from ddetr_cli.ops.native_cuda import CudaKernels

PLAIN = "plain"


@dataclass(frozen=True)
class Candidate:
    """``prepare`` gives, for a problem whose value and gradient have the right dtype, the call to be timed."""

    name: str
    dtypes: tuple[str, ...]
    prepare: Callable[[OpInput], Callable[[], tuple[Tensor, ...]]]
    takes_logits: bool = False  # of the softmax too: its result is that of the fused form


def our_kernels(device: torch.device) -> CudaKernels | None:
    """The installed ones; none without a GPU, where the reference takes their place."""
    return native_cuda.cuda_kernels() if device.type == "cuda" else None


def forward_candidates(device: torch.device, kernels: CudaKernels | None) -> list[Candidate]:
    """Plain first, or the reference where there are no kernels."""
    every = tuple(DTYPES)
    found: list[Candidate] = []
    if kernels is None:
        found.append(Candidate(PLAIN, ("fp32",), lambda p: lambda: (reference.msda_forward(*_inputs(p)),)))
    else:
        for kind in native_cuda.KERNELS:
            chosen = replace(kernels, kernels=kind)
            found.append(Candidate(kind, every, _forward(chosen)))
            found.append(Candidate(f"{kind}, fused", every, _fused(chosen), takes_logits=True))
    found.append(_chain(found[0]))
    grid = baseline()
    found.append(Candidate("grid_sample", ("fp32",), _of_backend(grid)))
    if device.type == "cuda":
        compiled = replace(grid, forward=torch.compile(grid.forward))
        found.append(Candidate("grid_sample, compiled", ("fp32",), _of_backend(compiled)))
    return [*found, *(Candidate(name, every, _of_backend(backend)) for name, backend in _others())]


def backward_candidates(kernels: CudaKernels | None) -> list[Candidate]:
    """As ``forward_candidates``; each also in its deterministic form."""
    if kernels is None:

        def prepare(problem: OpInput) -> Callable[[], tuple[Tensor, ...]]:
            return lambda: reference.msda_backward(problem.grad_output, *_inputs(problem))

        found = [Candidate(PLAIN, ("fp32",), prepare)]
    else:
        found = [
            Candidate(f"{kind}{', deterministic' if in_order else ''}", tuple(DTYPES), _backward(chosen, in_order))
            for kind in ("plain", "fast")
            for chosen in [replace(kernels, kernels=kind)]
            for in_order in (False, True)
        ]
    others = [("grid_sample", ("fp32",), baseline()), *((name, tuple(DTYPES), b) for name, b in _others())]
    return [*found, *(Candidate(name, dtypes, _autograd(backend)) for name, dtypes, backend in others)]


def _inputs(p: OpInput) -> tuple[Tensor, list[int], Tensor, Tensor]:
    return p.value, p.level_hw, p.sampling_xy, p.weights


def _forward(kernels: CudaKernels) -> Callable[[OpInput], Callable[[], tuple[Tensor, ...]]]:
    def prepare(problem: OpInput) -> Callable[[], tuple[Tensor, ...]]:
        inputs = _inputs(problem)
        return lambda: (kernels.forward(*inputs),)

    return prepare


def _fused(kernels: CudaKernels) -> Callable[[OpInput], Callable[[], tuple[Tensor, ...]]]:
    def prepare(p: OpInput) -> Callable[[], tuple[Tensor, ...]]:
        out = torch.empty_like(p.grad_output)

        def call() -> tuple[Tensor, ...]:
            kernels.fused(p.value, p.level_hw, p.reference_xy, p.projected, out)
            return (out,)

        return call

    return prepare


def _chain(plain: Candidate) -> Candidate:
    """What is fused otherwise: softmax and locations by PyTorch, then the plain op."""

    def prepare(p: OpInput) -> Callable[[], tuple[Tensor, ...]]:
        heads = p.value.shape[2]

        def call() -> tuple[Tensor, ...]:
            located = reference.locate_projected(p.level_hw, p.reference_xy, p.projected, heads)
            chained = replace(p, sampling_xy=located[0], logits=located[1].log())
            return plain.prepare(chained)()

        return call

    return Candidate(f"{plain.name}, softmax and locations before it", ("fp32",), prepare, takes_logits=True)


def _backward(kernels: CudaKernels, in_order: bool) -> Callable[[OpInput], Callable[[], tuple[Tensor, ...]]]:
    def prepare(problem: OpInput) -> Callable[[], tuple[Tensor, ...]]:
        inputs = _inputs(problem)
        return lambda: kernels.backward(problem.grad_output, *inputs, deterministic=in_order)

    return prepare


def _of_backend(backend: Backend) -> Callable[[OpInput], Callable[[], tuple[Tensor, ...]]]:
    def prepare(problem: OpInput) -> Callable[[], tuple[Tensor, ...]]:
        inputs = _inputs(problem)
        return lambda: (backend.forward(*inputs),)

    return prepare


def _autograd(backend: Backend) -> Callable[[OpInput], Callable[[], tuple[Tensor, ...]]]:
    """The backward pass of ``backend`` by autograd, without its forward pass."""

    def prepare(problem: OpInput) -> Callable[[], tuple[Tensor, ...]]:
        value, level_hw, xy, weights = _inputs(problem)
        leaves = [tensor.clone().requires_grad_() for tensor in (value, xy, weights)]
        with torch.enable_grad():
            output = backend.forward(leaves[0], level_hw, leaves[1], leaves[2])
        return lambda: torch.autograd.grad(output, leaves, problem.grad_output, retain_graph=True)

    return prepare


def _others() -> Iterator[tuple[str, Backend]]:
    """Kernels of others that are installed: ``pip install deformops``, ``pip install msda-triton``."""
    every = tuple(DTYPES)
    if importlib.util.find_spec("deformops") is not None:
        deformops: Any = importlib.import_module("deformops.registry")

        def by_deformops(value: Tensor, level_hw: list[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
            shapes, starts = _sizes(tuple(level_hw), value.device)
            return deformops.msda(value, shapes, starts, sampling_xy, weights.to(value.dtype))  # type: ignore[no-any-return]

        yield "deformops", Backend("deformops", every, by_deformops, None)
    if importlib.util.find_spec("msda_triton") is not None:
        msda_triton: Any = importlib.import_module("msda_triton")

        def by_triton(value: Tensor, level_hw: list[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
            shapes, _ = _sizes(tuple(level_hw), value.device)
            found = msda_triton.multiscale_deformable_attention(
                value,
                shapes,
                sampling_xy.to(value.dtype),
                weights.to(value.dtype),
                padding_mode="zeros",
                align_corners=False,
            )
            return found.flatten(-2)  # type: ignore[no-any-return]

        yield "msda-triton", Backend("msda-triton", every, by_triton, None)


_SIZES: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, Tensor]] = {}


def _sizes(level_hw: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sizes and first positions of the levels on the device, kept: copying them there cannot be captured."""
    key = (level_hw, device)
    if key not in _SIZES:
        shapes = torch.tensor(level_hw).view(-1, 2)
        ends = shapes.prod(1).cumsum(0)
        _SIZES[key] = shapes.to(device), torch.cat([ends.new_zeros(1), ends[:-1]]).to(device)
    return _SIZES[key]
