"""Inputs of the op as the model makes them, and everyone who can compute it here.

# B batch, Q queries, S positions over all levels, M heads, L levels, P points, D channels per head, C = M*D

Local points are what a trained model samples: around every query's own place, the initial star of offsets, moved by
N(0, 2 px). Uniform points lie anywhere: the worst case for a cache.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddetr_cli.bench.subjects import OFFSET_PIXELS
from ddetr_cli.errors import KernelError
from ddetr_cli.model.attention import DeformableAttention
from ddetr_cli.model.transformer import encoder_reference
from ddetr_cli.ops import msda, native, native_cuda, reference
from ddetr_cli.presets import get_preset

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = ("encoder", "decoder")
POINTS = ("local", "uniform")

Forward = Callable[[Tensor, list[int], Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, list[int], Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class OpInput:
    """One problem: the arguments of ``msda``, those of ``msda_fused``, and a gradient of the output."""

    value: Tensor  # (B,S,M,D) float32
    level_hw: list[int]
    sampling_xy: Tensor  # (B,Q,M,L,P,2)
    logits: Tensor  # (B,Q,M,L,P), before the softmax
    reference_xy: Tensor  # (B,Q,L,2)
    projected: Tensor  # (B,Q,3*M*L*P): offsets in pixels, then logits
    grad_output: Tensor  # (B,Q,C)

    @property
    def weights(self) -> Tensor:
        """(B,Q,M,L,P), summing to 1 over levels and points."""
        return self.logits.flatten(-2).softmax(-1).view_as(self.logits)


def make_input(shape: str, points: str, size_hw: tuple[int, int], batch_size: int, device: torch.device) -> OpInput:
    """The op's input in r50 for pictures of ``size_hw``; the same numbers every time."""
    config = get_preset("r50")
    M, L, P, D = config.heads, config.levels, config.points, config.hidden_dim // config.heads
    generator = torch.Generator().manual_seed(0)
    level_hw = level_sizes(size_hw, L)
    S = sum(h * w for h, w in zip(level_hw[::2], level_hw[1::2], strict=True))
    wh = torch.tensor(level_hw, dtype=torch.float32).view(L, 2).flip(-1)
    if shape == "encoder":
        centre = encoder_reference(level_hw, torch.ones(1, L, 2)).expand(batch_size, -1, -1, -1).contiguous()
    else:
        centre = torch.rand(batch_size, config.queries, 1, 2, generator=generator).expand(-1, -1, L, -1).contiguous()
    Q = centre.shape[1]
    if points == "local":
        star = DeformableAttention(config.hidden_dim, M, L, P).sampling_offsets.bias.detach().view(M, L, P, 2)
        offsets = star + torch.randn(batch_size, Q, M, L, P, 2, generator=generator) * OFFSET_PIXELS
    else:
        anywhere = torch.rand(batch_size, Q, M, L, P, 2, generator=generator)
        offsets = (anywhere - centre[:, :, None, :, None]) * wh[:, None]
    sampling_xy = centre[:, :, None, :, None] + offsets / wh[:, None]
    logits = torch.randn(batch_size, Q, M, L, P, generator=generator)
    found = OpInput(
        torch.randn(batch_size, S, M, D, generator=generator),
        level_hw,
        sampling_xy,
        logits,
        centre,
        torch.cat((offsets.flatten(2), logits.flatten(2)), dim=-1),
        torch.randn(batch_size, Q, M * D, generator=generator),
    )
    moved: dict[str, Any] = {n: tensor.to(device) for n, tensor in vars(found).items() if isinstance(tensor, Tensor)}
    return replace(found, **moved)


def level_sizes(size_hw: tuple[int, int], levels: int) -> list[int]:
    """[h0,w0,h1,w1,...] of the maps at strides 8, 16, 32, ... of a picture; every halving rounds up."""
    sizes: list[int] = []
    h, w = (-(-side // 8) for side in size_hw)
    for _ in range(levels):
        sizes += [h, w]
        h, w = -(-h // 2), -(-w // 2)
    return sizes


@dataclass(frozen=True)
class Backend:
    """Someone who computes the op. ``backward`` is None where autograd has to."""

    name: str
    dtypes: tuple[str, ...]  # of values, that it is worth timing with
    forward: Forward
    backward: Backward | None


def baseline() -> Backend:
    """What others use without a kernel of their own: transformers' grid_sample, or our reference in its absence."""
    if importlib.util.find_spec("transformers") is None:
        return _REFERENCE
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    core = MultiScaleDeformableAttention()

    def forward(value: Tensor, level_hw: list[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
        pairs = list(zip(level_hw[::2], level_hw[1::2], strict=True))
        unused = torch.empty(0)  # the sizes again, and where each level begins, as tensors
        return core(value, unused, pairs, unused, sampling_xy, weights, 64)  # type: ignore[no-any-return]

    return Backend("transformers grid_sample", ("fp32",), forward, None)


def backends(device: torch.device) -> list[Backend]:
    """Ours: what the op runs on ``device`` and each instruction set that can be forced; else the reference."""
    if device.type == "cuda":
        kernels: native.CpuKernels | native_cuda.CudaKernels | None = native_cuda.cuda_kernels()
    else:
        kernels = native.cpu_kernels()
    found = []
    if kernels is not None:
        name = kernels.isa if isinstance(kernels, native.CpuKernels) else "cuda"
        found.append(Backend(f"ddetr {name}", tuple(DTYPES), msda, torch.ops.ddetr.msda_backward))
    if isinstance(kernels, native.CpuKernels):
        found += [_forced(kernels, isa) for isa in ("avx2", "portable") if _can_force(kernels, isa)]
    return found or [_REFERENCE]


_REFERENCE = Backend("ddetr reference", ("fp32",), reference.msda_forward, reference.msda_backward)


def _forced(kernels: native.CpuKernels, isa: str) -> Backend:
    forced = replace(kernels, isa=isa)
    return Backend(f"ddetr {isa}", tuple(DTYPES), forced.forward, forced.backward)


def _can_force(kernels: native.CpuKernels, isa: str) -> bool:
    """Whether ``isa`` is another than the one in use anyway, and this processor has it."""
    if isa == kernels.isa:
        return False
    small = make_input("decoder", "local", (32, 32), 1, torch.device("cpu"))
    try:
        _forced(kernels, isa).forward(small.value, small.level_hw, small.sampling_xy, small.weights)
    except KernelError:
        return False
    return True
