"""The op from what a query's projections give: softmax, locations and sampling in one pass, for inference.

The same sums as ``msda``; the CPU kernel neither writes nor reads locations and weights, which are larger than the
value they sample.
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

_LIBRARY = torch.library.Library("ddetr", "FRAGMENT")
_ARGUMENTS = "Tensor value, SymInt[] level_hw, Tensor reference, Tensor projected"
_LIBRARY.define(f"msda_fused({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"msda_fused.out({_ARGUMENTS}, *, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def msda_fused(
    value: Tensor, level_hw: Sequence[int], reference: Tensor, projected: Tensor, out: Tensor | None = None
) -> Tensor:
    """``msda`` of ``value`` around ``reference``, with offsets and weights as the projections of a query give them.

    value (B,S,M,D) as for ``msda``, strided as it likes but for its channels: a slice of a wider matrix and a
    (B,M,S,D) seen as (B,S,M,D) are read where they lie. reference (B,Q,L,2), the centre that offsets count from in
    pixels of the level, or (B,Q,L,4), a box cxcywh that they count in: P is half its size; fractions of each map.
    projected (B,Q,3*M*L*P): offsets in the order (M,L,P,xy), then logits (M,L*P), whose softmax are the weights; a
    slice of a wider matrix will do. Both are float32, float64 for float64 values. Returns (B,Q,M*D), dtype of
    ``value``: ``out``, contiguous, where it is given. No gradients: raises RuntimeError where they are asked for,
    ShapeError and KernelError as ``msda``. Source: arXiv:2010.04159, section 4.1.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (value, reference, projected)):
        raise RuntimeError("msda_fused: has no gradients. Call it under torch.inference_mode(), or use msda.")
    if out is None:
        return cast(Tensor, torch.ops.ddetr.msda_fused(value, list(level_hw), reference, projected))
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


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("msda_fused", _native, _key)
    _LIBRARY.impl("msda_fused.out", _write_native, _key)
# devices there are no kernels for
_LIBRARY.impl("msda_fused", _reference, "CompositeExplicitAutograd")
_LIBRARY.impl("msda_fused.out", _write_reference, "CompositeExplicitAutograd")


def _fake(value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor) -> Tensor:
    check_arguments(value, level_hw, reference_points, projected)
    return value.new_empty(value.shape[0], projected.shape[1], value.shape[2] * value.shape[3])


def _fake_out(
    value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor, *, out: Tensor
) -> None:
    check_arguments(value, level_hw, reference_points, projected)
    _check_out(value, projected, out)


torch.library.register_fake("ddetr::msda_fused", _fake, lib=_LIBRARY)
torch.library.register_fake("ddetr::msda_fused.out", _fake_out, lib=_LIBRARY)


def _no_gradients(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("msda_fused: has no gradients. Call it under torch.inference_mode(), or use msda.")


torch.library.register_autograd("ddetr::msda_fused", _no_gradients, lib=_LIBRARY)


def _under_autocast(value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor) -> Tensor:
    real = reference.accumulate_dtype(value.dtype)
    with torch.autocast(value.device.type, enabled=False):
        return cast(
            Tensor, torch.ops.ddetr.msda_fused(value, level_hw, reference_points.to(real), projected.to(real))
        )


for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIBRARY.impl("msda_fused", _under_autocast, _key)
