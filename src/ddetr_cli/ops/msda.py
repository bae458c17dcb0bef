"""Multi-scale deformable attention as an op of PyTorch: schema, checks, tracing, gradients, autocast.

Defined with ``torch.library``'s ``define`` and ``impl``: ``custom_op`` costs more per call. ``kernels`` decides who
computes.
"""

# B batch, Q queries, S positions over all levels, M heads, L levels, P points, D channels per head

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ddetr_cli.errors import ShapeError
from ddetr_cli.ops import reference
from ddetr_cli.ops.kernels import kernels_for

_LIBRARY = torch.library.Library("ddetr", "DEF")
_LIBRARY.define(
    "msda(Tensor value, SymInt[] level_hw, Tensor sampling_xy, Tensor weights) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "msda_backward(Tensor grad_output, Tensor value, SymInt[] level_hw, Tensor sampling_xy, Tensor weights)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_STORAGE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def msda(value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
    """Sum bilinear samples of ``value`` at ``sampling_xy``, weighted by ``weights``.

    value (B,S,M,D) in float32, float64, float16 or bfloat16; sampling_xy (B,Q,M,L,P,2), x then y in [0,1] of each
    map, outside (also infinite or NaN) reads zero; weights (B,Q,M,L,P). Locations and weights are float32, float64
    for float64 values: 16-bit locations would be a grid of half a pixel. Returns (B,Q,M*D), dtype of ``value``.
    ``level_hw`` = [h0,w0,h1,w1,...], host integers with sum(h*w) == S. Differentiable once; on the CPU results are
    bitwise the same whatever the batch and the number of threads. Under autocast locations and weights are taken to
    float32 and ``value`` stays as it is. Raises ShapeError, and KernelError for a native library that does not work.
    Source: arXiv:2010.04159, eq. 3.
    """
    return cast(Tensor, torch.ops.ddetr.msda(value, list(level_hw), sampling_xy, weights))


def check_arguments(value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> None:
    """Raise ShapeError unless shapes, sizes, dtypes and devices fit together. Works on shapes alone."""
    if value.dim() != 4 or sampling_xy.dim() != 6 or weights.dim() != 5 or sampling_xy.shape[-1] != 2:
        raise ShapeError(
            f"msda: value {_shape(value)}, sampling_xy {_shape(sampling_xy)}, weights {_shape(weights)} do not have "
            "the forms (B,S,M,D), (B,Q,M,L,P,2), (B,Q,M,L,P)."
        )
    b, _, m, _ = value.shape
    if sampling_xy.shape[:5] != weights.shape or sampling_xy.shape[0] != b or sampling_xy.shape[2] != m:
        raise ShapeError(
            f"msda: value {_shape(value)}, sampling_xy {_shape(sampling_xy)} and weights {_shape(weights)} disagree "
            "on batch, queries, heads, levels or points."
        )
    check_value("msda", value, level_hw, sampling_xy.shape[3])
    real = reference.accumulate_dtype(value.dtype)
    if sampling_xy.dtype != real or weights.dtype != real:
        raise ShapeError(
            f"msda: sampling_xy is {sampling_xy.dtype} and weights {weights.dtype}; with value in {value.dtype} both "
            f"must be {real}."
        )
    if sampling_xy.device != value.device or weights.device != value.device:
        raise ShapeError(
            f"msda: value on {value.device}, sampling_xy on {sampling_xy.device}, weights on {weights.device}; all "
            "must be on one device."
        )


def check_value(op: str, value: Tensor, level_hw: Sequence[int], levels: int) -> None:
    """Raise ShapeError, in the name of ``op``, unless dtype and positions of ``value`` (B,S,M,D) fit ``levels``."""
    if len(level_hw) != 2 * levels:
        raise ShapeError(f"{op}: level_hw has {len(level_hw)} numbers, not height and width of {levels} levels.")
    positions, s = 0, value.shape[1]
    for height, width in zip(level_hw[::2], level_hw[1::2], strict=True):
        if height < 1 or width < 1:
            raise ShapeError(f"{op}: level_hw {list(level_hw)} holds a height or width below 1.")
        positions += height * width
    if positions != s:
        raise ShapeError(f"{op}: level_hw {list(level_hw)} makes {positions} positions, but value has {s}.")
    if value.dtype not in _STORAGE_DTYPES:
        raise ShapeError(f"{op}: value is {value.dtype}, not float32, float64, float16 or bfloat16.")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_grad_output(grad_output: Tensor, value: Tensor, sampling_xy: Tensor) -> None:
    b, _, m, d = value.shape
    if grad_output.shape != (b, sampling_xy.shape[1], m * d):
        raise ShapeError(
            f"msda_backward: grad_output {_shape(grad_output)} is not (B,Q,M*D) of value {_shape(value)} and "
            f"sampling_xy {_shape(sampling_xy)}."
        )
    if grad_output.dtype != value.dtype or grad_output.device != value.device:
        raise ShapeError(
            f"msda_backward: grad_output is {grad_output.dtype} on {grad_output.device}, value {value.dtype} on "
            f"{value.device}; they must be the same."
        )


# ---- who computes ----


def _forward_native(value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
    check_arguments(value, level_hw, sampling_xy, weights)
    return kernels_for(value.device).forward(value, level_hw, sampling_xy, weights)


def _backward_native(
    grad_output: Tensor, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_arguments(value, level_hw, sampling_xy, weights)
    _check_grad_output(grad_output, value, sampling_xy)
    return kernels_for(value.device).backward(grad_output, value, level_hw, sampling_xy, weights)


def _forward_reference(value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
    check_arguments(value, level_hw, sampling_xy, weights)
    return reference.msda_forward(value, level_hw, sampling_xy, weights)


def _backward_reference(
    grad_output: Tensor, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_arguments(value, level_hw, sampling_xy, weights)
    _check_grad_output(grad_output, value, sampling_xy)
    return reference.msda_backward(grad_output, value, level_hw, sampling_xy, weights)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("msda", _forward_native, _key)
    _LIBRARY.impl("msda_backward", _backward_native, _key)
# devices there are no kernels for
_LIBRARY.impl("msda", _forward_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("msda_backward", _backward_reference, "CompositeExplicitAutograd")


# ---- shapes under tracing ----


def _forward_fake(value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
    check_arguments(value, level_hw, sampling_xy, weights)
    b, _, m, d = value.shape
    return value.new_empty(b, sampling_xy.shape[1], m * d)


def _backward_fake(
    grad_output: Tensor, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_arguments(value, level_hw, sampling_xy, weights)
    _check_grad_output(grad_output, value, sampling_xy)
    return (
        value.new_empty(value.shape),
        sampling_xy.new_empty(sampling_xy.shape),
        weights.new_empty(weights.shape),
    )


torch.library.register_fake("ddetr::msda", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("ddetr::msda_backward", _backward_fake, lib=_LIBRARY)


# ---- gradients ----


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Sequence[int], Tensor, Tensor], output: Tensor) -> None:
    value, level_hw, sampling_xy, weights = inputs
    ctx.save_for_backward(value, sampling_xy, weights)
    ctx.level_hw = level_hw


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_xy, weights = ctx.saved_tensors
    grad_value, grad_xy, grad_weights = torch.ops.ddetr.msda_backward(
        grad_output, value, ctx.level_hw, sampling_xy, weights
    )
    return grad_value, None, grad_xy, grad_weights


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("msda: second derivatives are not implemented; differentiate reference.msda_forward.")


torch.library.register_autograd("ddetr::msda", _backward, setup_context=_save_for_backward, lib=_LIBRARY)
torch.library.register_autograd("ddetr::msda_backward", _no_second_derivative, lib=_LIBRARY)


# ---- autocast ----


def _under_autocast(value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
    real = reference.accumulate_dtype(value.dtype)
    with torch.autocast(value.device.type, enabled=False):
        return cast(Tensor, torch.ops.ddetr.msda(value, level_hw, sampling_xy.to(real), weights.to(real)))


for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIBRARY.impl("msda", _under_autocast, _key)
