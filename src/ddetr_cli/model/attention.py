"""The attentions: multi-scale deformable attention over feature maps, and the ordinary one, within and across.

# B batch, Q queries, S positions over all levels, M heads, L levels, P points, D channels per head, C = M*D
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr_cli.ops import msda, msda_fused, prefers_fused
from ddetr_cli.transfer import upload


class DeformableAttention(nn.Module):
    """Each query samples P points around its reference on every level. Source: arXiv:2010.04159, section 4.1."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start as eight directions, 1..P pixels out; weights uniform: the authors' initialisation."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None, :] * distance[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Tensor, reference: Tensor, memory: Tensor, level_hw: Sequence[int], is_padding: Tensor | None
    ) -> Tensor:
        """Attend from ``query`` (B,Q,C) to ``memory`` (B,S,C); returns (B,Q,C).

        reference (B,Q,L,2) centres or (B,Q,L,4) boxes cxcywh, fractions of each padded map; level_hw [h0,w0,...]
        host integers; is_padding (B,S), True where memory must not be read, or None where nothing is padded.
        """
        B, Q, _ = query.shape
        value = self.value_proj(memory)
        if is_padding is not None:
            value = value.masked_fill(is_padding[..., None], 0.0)
        value = value.view(B, -1, self.heads, value.shape[-1] // self.heads)
        # 16-bit coordinates are a grid of 0.3 to 0.6 pixels: everything that decides a location stays wide.
        with torch.autocast(query.device.type, enabled=False):
            wide = query.to(self.sampling_offsets.weight.dtype)
            is_fused = prefers_fused(query.device) and not (reference.shape[-1] == 4 and reference.requires_grad)
            if is_fused:
                projected = self._projected(wide)
            else:
                weights = self.attention_weights(wide).view(B, Q, self.heads, self.levels * self.points)
                weights = weights.softmax(-1).view(B, Q, self.heads, self.levels, self.points)
                sampling_xy = self._locations(self.sampling_offsets(wide), reference, level_hw)
        if is_fused:
            sampled = msda_fused(value, level_hw, reference.to(projected.dtype), projected)
        else:
            sampled = msda(value, level_hw, sampling_xy, weights)
        return self.output_proj(sampled)  # type: ignore[no-any-return]

    def _projected(self, query: Tensor) -> Tensor:
        """Offsets and logits of ``query`` (B,Q,C) side by side, (B,Q,3*M*L*P), by one product."""
        both = self.sampling_offsets, self.attention_weights
        weight, bias = (torch.cat([linear.get_parameter(name) for linear in both]) for name in ("weight", "bias"))
        return F.linear(query, weight, bias)

    def _locations(self, offsets: Tensor, reference: Tensor, level_hw: Sequence[int]) -> Tensor:
        """Sampling locations (B,Q,M,L,P,2) from offsets (B,Q,M*L*P*2): in pixels around centres, else in box sizes.

        Levels, points and coordinates are one axis while computing: inner axes of 2 and 4 numbers cost the CPU
        more than twice the time.
        """
        B, Q, _ = offsets.shape
        per_head = offsets.view(B, Q, self.heads, -1)

        def along(x: Tensor) -> Tensor:  # (..., L, 2) -> (..., L*P*2)
            return x.unsqueeze(-2).expand(*x.shape[:-1], self.points, 2).flatten(-3)

        centre = along(reference[..., :2]).unsqueeze(2)
        if reference.shape[-1] == 2:
            wh = upload(torch.tensor(level_hw, dtype=offsets.dtype), offsets.device).view(self.levels, 2).flip(-1)
            moved = centre + per_head / along(wh)
        else:
            moved = centre + per_head / self.points * along(reference[..., 2:]).unsqueeze(2) * 0.5
        return moved.view(B, Q, self.heads, self.levels, self.points, 2)


class MultiHeadAttention(nn.Module):
    """The tensors of multi-head attention under PyTorch's names, and its arithmetic. Source: arXiv:1706.03762."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        """``x`` (...,C) through the input projections ``first`` to before ``last``: 0 query, 1 key, 2 value."""
        rows = slice(first * x.shape[-1], last * x.shape[-1])
        return F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, is_padding: Tensor | None) -> Tensor:
        """Projected query (B,Q,C), key and value (B,S,C) to (B,Q,C); keys where is_padding (B,S) are not read."""
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        mask = None if is_padding is None else ~is_padding[:, None, None]
        dropout = self.dropout if self.training else 0.0
        if query.device.type == "cpu":
            # The CPU's fused attention takes five times as long backward in bf16 as in fp32 (100 queries, 8 x 16).
            with torch.autocast("cpu", enabled=False):
                q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key, value))
                mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout).to(query.dtype)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SelfAttention(MultiHeadAttention):
    """Attention within one sequence; positions reach queries and keys only."""

    def forward(self, x: Tensor, position: Tensor, is_padding: Tensor | None = None) -> Tensor:
        """Mix ``x`` (B,Q,C), placed by ``position`` (B,Q,C), not read where is_padding (B,Q); returns (B,Q,C)."""
        query, key = self._project(x + position, 0, 2).chunk(2, dim=-1)
        return self._mix(query, key, self._project(x, 2, 3), is_padding)


class CrossAttention(MultiHeadAttention):
    """Attention from one sequence into another."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_padding: Tensor | None) -> Tensor:
        """From ``query`` (B,Q,C) to ``key``, ``value`` (B,S,C), not read where is_padding (B,S); returns (B,Q,C)."""
        return self._mix(self._project(query, 0, 1), self._project(key, 1, 2), self._project(value, 2, 3), is_padding)
