"""The definition of correct for the op: multi-scale deformable attention in plain PyTorch, on any device.

Every native kernel is compared with these functions, and they run in its place where no native library is.
They do not look at autocast or at errors in the arguments; that is ``msda``'s business.

Conventions every implementation keeps:

* A location x in [0,1] lies at pixel ``x * width - 0.5``. A point counts where -1 < pixel < size on both axes;
  any other, infinite or NaN, contributes 0 and receives zero gradients, whatever its weight holds.
* Of its four neighbours those outside the map read as zero and are never touched, so a NaN in ``value`` or
  ``weights`` reaches only the outputs of points that have it among their neighbours (IEEE arithmetic: 0 * NaN is
  NaN there).
* 16-bit values are added up in float32; the gradient of the location is that of the cell ``floor(pixel)``.
"""

# B batch, Q queries, S positions over all levels, M heads, L levels, P points, D channels per head

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(value_dtype: torch.dtype) -> torch.dtype:
    """The dtype of locations, weights and sums for values of ``value_dtype``: float64 for float64, else float32."""
    return torch.float64 if value_dtype == torch.float64 else torch.float32


def msda_forward(value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
    """``msda`` in plain PyTorch operations, which autograd differentiates. Shapes as there."""
    b, _, m, d = value.shape
    q, points = sampling_xy.shape[1], sampling_xy.shape[4]
    table = _table(value)
    output = table.new_zeros(b * q * m, d)
    if output.numel() == 0 or points == 0:
        return output.view(b, q, m * d).to(value.dtype)
    for level in _levels(level_hw):
        corners = list(_corners(level, sampling_xy, value))
        weight = weights[:, :, :, level.index]
        rows = torch.stack([corner.row for corner in corners], dim=-1)
        factors = torch.stack(
            [torch.where(corner.is_inside, weight * corner.factor, 0) for corner in corners], dim=-1
        )
        output = output + F.embedding_bag(
            rows.reshape(b * q * m, points * 4),
            table,
            mode="sum",
            per_sample_weights=factors.reshape(b * q * m, points * 4),
        )
    return output.view(b, q, m * d).to(value.dtype)


def msda_backward(
    grad_output: Tensor, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, written out; equal to autograd's of ``msda_forward``.

    Written out because autograd does not record inside an op, and because it keeps one corner in memory, not all.
    """
    b, s, m, d = value.shape
    q = sampling_xy.shape[1]
    table = _table(value)
    grad_table = torch.zeros_like(table)
    grad = grad_output.to(table.dtype).reshape(b, q, m, 1, d)
    grad_xy = torch.zeros_like(sampling_xy, memory_format=torch.contiguous_format)
    grad_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    for level in _levels(level_hw):
        weight = weights[:, :, :, level.index]
        for corner in _corners(level, sampling_xy, value):
            factor = torch.where(corner.is_inside, weight * corner.factor, 0)
            grad_table.index_add_(0, corner.row.flatten(), (factor.unsqueeze(-1) * grad).reshape(-1, d))
            sample = table.index_select(0, corner.row.flatten()).view(*corner.row.shape, d)
            dot = torch.where(corner.is_inside, (sample * grad).sum(-1), 0)
            grad_weights[:, :, :, level.index] += corner.factor * dot
            by_x, by_y = weight * corner.factor_by_x * dot, weight * corner.factor_by_y * dot
            grad_xy[:, :, :, level.index, :, 0] += torch.where(corner.is_inside, by_x * level.width, 0)
            grad_xy[:, :, :, level.index, :, 1] += torch.where(corner.is_inside, by_y * level.height, 0)
    grad_value = grad_table[:-1].view(b, s, m, d).to(value.dtype)
    return grad_value, grad_xy, grad_weights


def locate_projected(
    level_hw: Sequence[int], reference: Tensor, projected: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """The locations (B,Q,M,L,P,2) and weights (B,Q,M,L,P) that ``msda`` takes, from what ``msda_fused`` takes."""
    batch, queries, levels, numbers = reference.shape
    points = projected.shape[2] // (3 * heads * levels) if heads * levels > 0 else 0
    samples = heads * levels * points
    offsets = projected[..., : 2 * samples].reshape(batch, queries, heads, levels, points, 2)
    logits = projected[..., 2 * samples :].reshape(batch, queries, heads, levels * points)
    centre = reference[:, :, None, :, None, :2]
    if numbers == 2:
        hw = torch.tensor(level_hw, dtype=offsets.dtype, device=offsets.device).view(levels, 2)
        moved = centre + offsets / hw.flip(-1)[:, None, :]
    else:
        moved = centre + offsets / points * reference[:, :, None, :, None, 2:] * 0.5
    weights = logits.softmax(-1) if logits.numel() > 0 else logits
    return moved, weights.view(batch, queries, heads, levels, points)


def msda_fused(value: Tensor, level_hw: Sequence[int], reference: Tensor, projected: Tensor) -> Tensor:
    """``msda_fused`` in plain PyTorch operations. Shapes as there."""
    return msda_forward(value, level_hw, *locate_projected(level_hw, reference, projected, value.shape[2]))


def fused_backward(
    backward: Callable[[Tensor, Tensor, Sequence[int], Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    grad_output: Tensor,
    value: Tensor,
    level_hw: Sequence[int],
    reference: Tensor,
    projected: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of value and projections of ``msda_fused``, by way of ``backward`` of locations and weights."""
    xy, weights = locate_projected(level_hw, reference, projected, value.shape[2])
    grad_value, grad_xy, grad_weights = backward(grad_output, value, level_hw, xy, weights)
    levels, points = weights.shape[3:]
    if reference.shape[3] == 2:
        hw = torch.tensor(level_hw, dtype=xy.dtype, device=xy.device).view(levels, 2)
        grad_offsets = grad_xy / hw.flip(-1)[:, None, :]
    else:
        grad_offsets = grad_xy / max(points, 1) * reference[:, :, None, :, None, 2:] * 0.5
    shares = weights * grad_weights
    grad_logits = shares - weights * shares.sum((3, 4), keepdim=True)
    return grad_value, torch.cat([grad_offsets.flatten(2), grad_logits.flatten(2)], dim=2)


@dataclass(frozen=True)
class _Level:
    index: int
    height: int
    width: int
    start: int  # its first position


@dataclass(frozen=True)
class _Corner:
    """One of the four neighbours of every point of a level; tensors (B,Q,M,P)."""

    is_inside: Tensor
    row: Tensor  # of the table; the last one, zeros, where the neighbour is not inside
    factor: Tensor  # bilinear
    factor_by_x: Tensor  # its derivatives by the pixel
    factor_by_y: Tensor


def _levels(level_hw: Sequence[int]) -> Iterator[_Level]:
    start = 0
    for index in range(len(level_hw) // 2):
        height, width = level_hw[2 * index], level_hw[2 * index + 1]
        yield _Level(index, height, width, start)
        start += height * width


def _table(value: Tensor) -> Tensor:
    """(B*S*M+1, D): every row of ``value`` in the dtype of the sums, and one of zeros."""
    rows = value.to(accumulate_dtype(value.dtype)).reshape(-1, value.shape[3])
    return torch.cat([rows, rows.new_zeros(1, value.shape[3])])


def _corners(level: _Level, sampling_xy: Tensor, value: Tensor) -> Iterator[_Corner]:
    b, s, m, _ = value.shape
    xy = sampling_xy[:, :, :, level.index]
    x, y = xy[..., 0] * level.width - 0.5, xy[..., 1] * level.height - 0.5
    is_used = (x > -1) & (y > -1) & (x < level.width) & (y < level.height)  # False for NaN and infinity
    x, y = torch.where(is_used, x, 0), torch.where(is_used, y, 0)
    column, line = x.detach().floor(), y.detach().floor()
    right, low = x - column, y - line
    left, high = 1 - right, 1 - low
    column, line = column.to(torch.int64), line.to(torch.int64)
    batch = torch.arange(b, device=value.device).view(b, 1, 1, 1)
    head = torch.arange(m, device=value.device).view(1, 1, m, 1)
    upper_left = ((batch * s + level.start + line * level.width + column) * m) + head
    has = {
        "left": column >= 0,
        "right": column + 1 < level.width,
        "high": line >= 0,
        "low": line + 1 < level.height,
    }
    for horizontal, dx, by_x, sign_x in (("left", 0, left, -1), ("right", 1, right, 1)):
        for vertical, dy, by_y, sign_y in (("high", 0, high, -1), ("low", 1, low, 1)):
            is_inside = is_used & has[horizontal] & has[vertical]
            row = torch.where(is_inside, upper_left + (dy * level.width + dx) * m, b * s * m)
            yield _Corner(is_inside, row, by_x * by_y, sign_x * by_y, sign_y * by_x)
