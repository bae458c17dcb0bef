"""How big a model is: parameters, and multiply-adds of one picture, counted on shapes without computing.

Convention: one multiply-add is one FLOP, as in the papers' tables. Convolutions, matrix products, attention and the
deformable op are counted; norms, activations, softmax and additions are not.
"""

# B batch, Q queries, M heads, L levels, P points, D channels per head

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ddetr_cli.model.detector import DeformableDetr

FLOPS_CONVENTION = "one multiply-add is one FLOP; convolutions, matrix products, attention, deformable sampling"

# Per sampled value: four corners of the bilinear sum and the attention weight.
MULTIPLY_ADDS_PER_SAMPLE = 5

_KINDS = {"convolution": "convolution", "mm": "linear", "scaled_dot_product": "attention", "msda": "deformable"}


@dataclass(frozen=True)
class ModelSize:
    """What a model weighs: parameters (as the authors count, without buffers) and FLOPs by kind of operation."""

    parameters: int
    trainable_parameters: int
    flops_by_operation: dict[str, int]

    @property
    def flops(self) -> int:
        """All multiply-adds of the pass."""
        return sum(self.flops_by_operation.values())


def measure_size(model: DeformableDetr, size_hw: tuple[int, int]) -> ModelSize:
    """Parameters of ``model``, and FLOPs of one forward pass over one picture of ``size_hw`` (h, w)."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.ddetr.msda: _msda_flops})
    # Fake tensors have shapes and no numbers: a second instead of a forward pass, and no memory. The counter follows
    # gradients, so they must be on.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), counter:
        model(torch.zeros(1, 3, *size_hw), torch.zeros(1, *size_hw, dtype=torch.bool))
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    flops: dict[str, int] = dict.fromkeys(_KINDS.values(), 0)
    for operation, count in counter.get_flop_counts()["Global"].items():
        kind = next(kind for part, kind in _KINDS.items() if part in str(operation))
        flops[kind] += int(count) // 2  # PyTorch counts a multiply-add as two
    return ModelSize(
        parameters=sum(count for count, _ in parameters),
        trainable_parameters=sum(count for count, is_trained in parameters if is_trained),
        flops_by_operation=flops,
    )


def _msda_flops(
    value: Sequence[int], _level_hw: Sequence[int], _sampling_xy: Sequence[int], weights: Sequence[int], **_: Any
) -> int:
    """PyTorch's count (two per multiply-add) of the op, from the shapes of its arguments."""
    B, Q, M, L, P = weights
    return 2 * MULTIPLY_ADDS_PER_SAMPLE * B * Q * M * L * P * value[-1]
