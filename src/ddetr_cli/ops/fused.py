"""The op from what a query's projections give: softmax, locations and sampling in one pass.

The same sums as ``msda``; the kernels neither write nor read locations and weights, which are larger than the value
they sample. Backward too on a GPU; on a CPU it goes by way of them.
"""

# B batch, Q queries, S positions over all levels, M heads, L levels, P points, D channels per head

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ddetr_cli.errors import ShapeError
from ddetr_cli.ops import native, reference
from ddetr_cli.ops.kernels import kernels_for
from ddetr_cli.ops.msda import check_value
from ddetr_cli.transfer import upload

_LIBRARY = torch.library.Library("ddetr", "FRAGMENT")
_ARGUMENTS = "Tensor value, SymInt[] level_hw, Tensor reference, Tensor projected"
_LIBRARY.define(f"msda_fused({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"msda_fused.out({_ARGUMENTS}, *, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    f"msda_fused_backward(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)


def msda_fused(
    value: Tensor, level_hw: Sequence[int], reference: Tensor, projected: Tensor, out: Tensor | None = None
) -> Tensor:
    """``msda`` of ``value`` around ``reference``, with offsets and weights as the projections of a query give them.

    value (B,S,M,D) as for ``msda``, strided as it likes but for its channels: a slice of a wider matrix and a
    (B,M,S,D) seen as (B,S,M,D) are read where they lie. reference (B,Q,L,2), the centre that offsets count from in
    pixels of the level, or (B,Q,L,4), a box cxcywh that they count in: P is half its size; fractions of each map.
    projected (B,Q,3*M*L*P): offsets in the order (M,L,P,xy), then logits (M,L*P), whose softmax are the weights; a
    slice of a wider matrix will do. Both are float32, float64 for float64 values. Returns (B,Q,M*D), dtype of
    ``value``: ``out``, contiguous, where it is given. Differentiable once, but not by boxes nor with ``out``: raises
    RuntimeError where that is asked for, ShapeError and KernelError as ``msda``. Source: arXiv:2010.04159, section
    4.1.
    """
    if out is None:
        return cast(Tensor, torch.ops.ddetr.msda_fused(value, list(level_hw), reference, projected))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (value, reference, projected)):
        raise RuntimeError("msda_fused: has no gradients with out. Leave it out, or use torch.inference_mode().")
    torch.ops.ddetr.msda_fused.out(value, list(level_hw), reference, projected, out=out)
    return out


def check_arguments(value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor) -> None:
    """Raise ShapeError unless shapes, sizes, dtypes and devices fit together. Works on shapes alone."""
    shapes = (
        f"value {tuple(value.shape)}, reference {tuple(reference_points.shape)}, projected {tuple(projected.shape)}"
    )
    if value.dim() != 4 or reference_points.dim() != 4 or projected.dim() != 3:
        raise ShapeError(f"msda_fused: {shapes} do not have the forms (B,S,M,D), (B,Q,L,2|4), (B,Q,3*M*L*P).")
    batch, _, heads, _ = value.shape
    _, queries, levels, numbers = reference_points.shape
    if numbers not in (2, 4):
        raise ShapeError(f"msda_fused: reference has {numbers} numbers, neither 2 (x, y) nor 4 (cx, cy, w, h).")
    if reference_points.shape[0] != batch or projected.shape[:2] != (batch, queries):
        raise ShapeError(f"msda_fused: {shapes} disagree on batch or queries.")
    per_point = 3 * heads * levels
    if (projected.shape[2] % per_point if per_point > 0 else projected.shape[2]) != 0:
        raise ShapeError(f"msda_fused: {shapes}: projected does not hold 3 numbers for every head, level and point.")
    check_value("msda_fused", value, level_hw, levels)
    real = reference.accumulate_dtype(value.dtype)
    if reference_points.dtype != real or projected.dtype != real:
        raise ShapeError(
            f"msda_fused: reference is {reference_points.dtype} and projected {projected.dtype}; with value in "
            f"{value.dtype} both must be {real}."
        )
    if reference_points.device != value.device or projected.device != value.device:
        raise ShapeError(
            f"msda_fused: value on {value.device}, reference on {reference_points.device}, projected on "
            f"{projected.device}; all must be on one device."
        )


def _check_out(value: Tensor, projected: Tensor, out: Tensor) -> None:
    shape = (value.shape[0], projected.shape[1], value.shape[2] * value.shape[3])
    if out.shape != shape or out.dtype != value.dtype or out.device != value.device or not out.is_contiguous():
        raise ShapeError(
            f"msda_fused: out {tuple(out.shape)} {out.dtype} on {out.device} is not contiguous {tuple(shape)} "
            f"{value.dtype} on {value.device}."
        )


def _write_native(
    value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor, *, out: Tensor
) -> None:
    check_arguments(value, level_hw, reference_points, projected)
    _check_out(value, projected, out)
    kernels_for(value.device).fused(value, level_hw, reference_points, projected, out)


def _native(value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor) -> Tensor:
    check_arguments(value, level_hw, reference_points, projected)
    out = native.empty_output(value, projected.shape[1])
    kernels_for(value.device).fused(value, level_hw, reference_points, projected, out)
    return out


def _reference(value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor) -> Tensor:
    check_arguments(value, level_hw, reference_points, projected)
    return reference.msda_fused(value, level_hw, reference_points, projected)


def _write_reference(
    value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor, *, out: Tensor
) -> None:
    _check_out(value, projected, out)
    out.copy_(_reference(value, level_hw, reference_points, projected))


def _check_grad_output(grad_output: Tensor, value: Tensor, projected: Tensor) -> None:
    shape = (value.shape[0], projected.shape[1], value.shape[2] * value.shape[3])
    if grad_output.shape != shape or grad_output.dtype != value.dtype or grad_output.device != value.device:
        raise ShapeError(
            f"msda_fused_backward: grad_output {tuple(grad_output.shape)} {grad_output.dtype} on "
            f"{grad_output.device} is not {shape} {value.dtype} on {value.device}."
        )


def _backward_native(
    grad_output: Tensor, value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor
) -> tuple[Tensor, Tensor]:
    check_arguments(value, level_hw, reference_points, projected)
    _check_grad_output(grad_output, value, projected)
    return kernels_for(value.device).fused_backward(grad_output, value, level_hw, reference_points, projected)


def _backward_reference(
    grad_output: Tensor, value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor
) -> tuple[Tensor, Tensor]:
    check_arguments(value, level_hw, reference_points, projected)
    _check_grad_output(grad_output, value, projected)
    return reference.fused_backward(
        reference.msda_backward, grad_output, value, level_hw, reference_points, projected
    )


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("msda_fused", _native, _key)
    _LIBRARY.impl("msda_fused.out", _write_native, _key)
    _LIBRARY.impl("msda_fused_backward", _backward_native, _key)
# devices there are no kernels for
_LIBRARY.impl("msda_fused", _reference, "CompositeExplicitAutograd")
_LIBRARY.impl("msda_fused.out", _write_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("msda_fused_backward", _backward_reference, "CompositeExplicitAutograd")


def _fake(value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor) -> Tensor:
    check_arguments(value, level_hw, reference_points, projected)
    return value.new_empty(value.shape[0], projected.shape[1], value.shape[2] * value.shape[3])


def _fake_out(
    value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor, *, out: Tensor
) -> None:
    check_arguments(value, level_hw, reference_points, projected)
    _check_out(value, projected, out)


torch.library.register_fake("ddetr::msda_fused", _fake, lib=_LIBRARY)


def _fake_backward(
    grad_output: Tensor, value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor
) -> tuple[Tensor, Tensor]:
    check_arguments(value, level_hw, reference_points, projected)
    _check_grad_output(grad_output, value, projected)
    return value.new_empty(value.shape), projected.new_empty(projected.shape)


torch.library.register_fake("ddetr::msda_fused.out", _fake_out, lib=_LIBRARY)
torch.library.register_fake("ddetr::msda_fused_backward", _fake_backward, lib=_LIBRARY)


# ---- gradients ----


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Sequence[int], Tensor, Tensor], output: Tensor) -> None:
    value, level_hw, reference_points, projected = inputs
    if ctx.needs_input_grad[2] and reference_points.shape[3] == 4:
        raise RuntimeError("msda_fused: has no gradients by boxes. Detach them, or use msda.")
    ctx.save_for_backward(value, reference_points, projected)
    ctx.level_hw = level_hw


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor]:
    value, reference_points, projected = ctx.saved_tensors
    grad_value, grad_projected = torch.ops.ddetr.msda_fused_backward(
        grad_output, value, ctx.level_hw, reference_points, projected
    )
    by_centre = None
    if ctx.needs_input_grad[2]:
        # All offsets of a level move with its centre, by as many pixels as the level has.
        batch, queries, levels, _ = reference_points.shape
        heads = value.shape[2]
        points = projected.shape[2] // max(3 * heads * levels, 1)
        by_offset = grad_projected[..., : 2 * heads * levels * points].view(batch, queries, heads, levels, points, 2)
        wh = torch.tensor(ctx.level_hw, dtype=by_offset.dtype).view(levels, 2).flip(-1)
        by_centre = by_offset.sum((2, 4)) * upload(wh, by_offset.device)
    return grad_value, None, by_centre, grad_projected


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("msda_fused: second derivatives are not implemented.")


torch.library.register_autograd("ddetr::msda_fused", _backward, setup_context=_save_for_backward, lib=_LIBRARY)
torch.library.register_autograd("ddetr::msda_fused_backward", _no_second_derivative, lib=_LIBRARY)


def _under_autocast(value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor) -> Tensor:
    real = reference.accumulate_dtype(value.dtype)
    with torch.autocast(value.device.type, enabled=False):
        return cast(
            Tensor, torch.ops.ddetr.msda_fused(value, level_hw, reference_points.to(real), projected.to(real))
        )


for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIBRARY.impl("msda_fused", _under_autocast, _key)
