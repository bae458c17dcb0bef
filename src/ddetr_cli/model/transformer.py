"""Encoder and decoder: from feature maps to query embeddings and their reference boxes.

# B batch, Q queries, S positions over all levels, L levels, C channels, K classes, N decoder layers
Every number follows arXiv:2010.04159 and the authors' code; the layer-norms of the decoder are numbered as theirs
(norm2 after self-attention, norm1 after cross-attention), so that tensors keep the names the world knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr_cli.model.attention import DeformableAttention, SelfAttention
from ddetr_cli.model.dropout import Dropout
from ddetr_cli.model.position import encode_coordinate
from ddetr_cli.presets import ModelConfig

# Coordinates are float32 whatever the weights are, as in the authors' code: 16 bits would be a grid of half a pixel,
# and with 64 our numbers would differ from theirs in the seventh digit.
GEOMETRY = torch.float32


def _at_least(dtype: torch.dtype, x: Tensor) -> Tensor:
    """``x`` widened to ``dtype`` where it is narrower."""
    return x.to(torch.promote_types(x.dtype, dtype))


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of ``x`` (...) in [0,1], clamped ``eps`` away from both ends."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def refine_boxes(delta: Tensor, reference: Tensor) -> Tensor:
    """Boxes (..., 4) cxcywh in [0,1]: ``delta`` (..., 4) added to a reference (..., 2 or 4) in logit space."""
    base = inverse_sigmoid(reference)
    if base.shape[-1] == 2:
        base = F.pad(base, (0, 2))
    return (delta.to(base.dtype) + base).sigmoid()


@dataclass
class Proposals:
    """The first stage's answer for every position: logits (B,S,K), boxes cxcywh before the sigmoid (B,S,4)."""

    logits: Tensor
    boxes_unactivated: Tensor


@dataclass
class TransformerOutput:
    """What the decoder computed, layer by layer.

    hidden: N tensors (B,Q,C); references: N tensors, the reference (B,Q,2 or 4) each layer looked around, in [0,1];
    boxes: N tensors (B,Q,4) with refinement, else empty.
    """

    hidden: list[Tensor]
    references: list[Tensor]
    boxes: list[Tensor]
    proposals: Proposals | None


class EncoderLayer(nn.Module):
    """Deformable self-attention over all positions, then a feed-forward network; norms follow the sums."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.self_attn = DeformableAttention(C, config.heads, config.levels, config.points)
        self.norm1 = nn.LayerNorm(C)
        self.linear1 = nn.Linear(C, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, C)
        self.norm2 = nn.LayerNorm(C)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, level_hw: Sequence[int], is_padding: Tensor | None
    ) -> Tensor:
        """(B,S,C) -> (B,S,C)."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, reference, x, level_hw, is_padding)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention into the memory, feed-forward; norms follow the sums."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.cross_attn = DeformableAttention(C, config.heads, config.levels, config.points)
        self.norm1 = nn.LayerNorm(C)
        self.self_attn = SelfAttention(C, config.heads, config.dropout)
        self.norm2 = nn.LayerNorm(C)
        self.linear1 = nn.Linear(C, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, C)
        self.norm3 = nn.LayerNorm(C)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        level_hw: Sequence[int],
        is_padding: Tensor | None,
    ) -> Tensor:
        """(B,Q,C) -> (B,Q,C); reference (B,Q,L,2 or 4)."""
        x = self.norm2(x + self.dropout(self.self_attn(x, position)))
        attended = self.cross_attn(x + position, reference, memory, level_hw, is_padding)
        x = self.norm1(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm3(x + self.dropout(self.linear2(hidden)))  # type: ignore[no-any-return]


class Layers(nn.Module):
    """A stack that keeps the authors' ``layers.N`` names."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class DeformableTransformer(nn.Module):
    """Encoder, decoder and, in two-stage models, the proposal stage between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.config = config
        self.encoder = Layers([EncoderLayer(config) for _ in range(config.encoder_layers)])
        self.decoder = Layers([DecoderLayer(config) for _ in range(config.decoder_layers)])
        self.level_embed = nn.Parameter(torch.empty(config.levels, C))
        if config.two_stage:
            self.enc_output = nn.Linear(C, C)
            self.enc_output_norm = nn.LayerNorm(C)
            self.pos_trans = nn.Linear(2 * C, 2 * C)
            self.pos_trans_norm = nn.LayerNorm(2 * C)
        else:
            self.reference_points = nn.Linear(C, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every matrix, then the attentions' own start, then N(0,1) level embeddings."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if not self.config.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def forward(
        self,
        maps: Sequence[Tensor],
        paddings: Sequence[Tensor],
        positions: Sequence[Tensor],
        query_embed: Tensor | None,
        class_heads: Sequence[nn.Module],
        box_heads: Sequence[nn.Module],
        *,
        is_padded: bool = True,
    ) -> TransformerOutput:
        """Decode L maps (B,C,h,w) with paddings (B,h,w) and positions (B,C,h,w).

        ``is_padded`` False promises that no padding is set, and skips masking.

        query_embed (Q,2C), position half first; None in two-stage models. The heads are used here only where the
        method needs them between layers: box refinement, and the last of each for the proposals.
        """
        level_hw = [side for m in maps for side in (m.shape[-2], m.shape[-1])]
        memory = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        is_padding = torch.cat([p.flatten(1) for p in paddings], dim=1) if is_padded else None
        position = torch.cat(
            [p.flatten(2).transpose(1, 2) + self.level_embed[i] for i, p in enumerate(positions)], dim=1
        )
        valid_ratios = torch.stack([_valid_ratio(p, GEOMETRY) for p in paddings], dim=1)
        reference = encoder_reference(level_hw, valid_ratios)
        for layer in self.encoder.layers:
            memory = layer(memory, position, reference, level_hw, is_padding)

        proposals = None
        if query_embed is None:
            proposals, start, query_position, x = self._propose(
                memory, is_padding, level_hw, paddings, class_heads[-1], box_heads[-1]
            )
        else:
            query_position, x = query_embed.unsqueeze(0).expand(memory.shape[0], -1, -1).chunk(2, dim=-1)
            start = _at_least(GEOMETRY, self.reference_points(query_position)).sigmoid()

        out = TransformerOutput([], [], [], proposals)
        current = start
        for i, layer in enumerate(self.decoder.layers):
            ratios = valid_ratios if current.shape[-1] == 2 else valid_ratios.repeat(1, 1, 2)
            x = layer(x, query_position, current[:, :, None] * ratios[:, None], memory, level_hw, is_padding)
            out.hidden.append(x)
            out.references.append(current)
            if self.config.refine_boxes:
                boxes = refine_boxes(box_heads[i](x), current)
                out.boxes.append(boxes)
                current = boxes.detach()
        return out

    def _propose(
        self,
        memory: Tensor,
        is_padding: Tensor | None,
        level_hw: Sequence[int],
        paddings: Sequence[Tensor],
        class_head: nn.Module,
        box_head: nn.Module,
    ) -> tuple[Proposals, Tensor, Tensor, Tensor]:
        """First stage: every position proposes a box; the best become references, and their sine code the queries.

        Returns the proposals, references (B,Q,4) in [0,1], query positions and query contents (B,Q,C).
        """
        anchors, is_usable = anchor_logits(level_hw, paddings, GEOMETRY)
        if is_padding is not None:
            is_usable = is_usable & ~is_padding
        anchors = anchors.masked_fill(~is_usable[..., None], float("inf"))
        features = self.enc_output_norm(self.enc_output(memory.masked_fill(~is_usable[..., None], 0.0)))
        logits = class_head(features)
        boxes = _at_least(GEOMETRY, box_head(features)) + anchors
        # Channel 0 alone ranks them: the encoder's loss relabels every object to class 0.
        best = logits[..., 0].topk(min(self.config.queries, logits.shape[1]), dim=1).indices
        unactivated = boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        reference = unactivated.sigmoid()
        code = encode_coordinate(reference, self.config.hidden_dim // 2).flatten(-2)
        query_position, x = self.pos_trans_norm(self.pos_trans(code)).chunk(2, dim=-1)
        return Proposals(logits, boxes), reference, query_position, x


def _valid_ratio(is_padding: Tensor, dtype: torch.dtype) -> Tensor:
    """Valid fraction (B,2) of width and height of one map's padding (B,h,w), counted on its first row and column."""
    h, w = is_padding.shape[-2:]
    valid = ~is_padding
    return torch.stack((valid[:, 0, :].sum(1).to(dtype) / w, valid[:, :, 0].sum(1).to(dtype) / h), dim=-1)


def encoder_reference(level_hw: Sequence[int], valid_ratios: Tensor) -> Tensor:
    """Reference (B,S,L,2), x then y: each position's own centre, expressed on every level.

    valid_ratios (B,L,2) as (w,h): centres are first fractions of the valid part, then of each padded map.
    """
    dtype, device = valid_ratios.dtype, valid_ratios.device
    centres = []
    for level, (h, w) in enumerate(zip(level_hw[0::2], level_hw[1::2], strict=True)):
        y = torch.arange(0.5, h, dtype=dtype, device=device)
        x = torch.arange(0.5, w, dtype=dtype, device=device)
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        grid = torch.stack((grid_x.reshape(-1), grid_y.reshape(-1)), dim=-1)
        size = torch.stack((valid_ratios[:, level, 0] * w, valid_ratios[:, level, 1] * h), dim=-1)
        centres.append(grid[None] / size[:, None])
    return torch.cat(centres, dim=1)[:, :, None] * valid_ratios[:, None]


def anchor_logits(level_hw: Sequence[int], paddings: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Proposal anchors (B,S,4) cxcywh as logits, and which are usable (B,S): all four numbers in (0.01, 0.99).

    Centres are fractions of each image's valid part; sides are 0.05 * 2^level.
    """
    anchors = []
    for level, (h, w) in enumerate(zip(level_hw[0::2], level_hw[1::2], strict=True)):
        valid = ~paddings[level]
        device = valid.device
        y, x = torch.meshgrid(
            torch.arange(h, dtype=dtype, device=device), torch.arange(w, dtype=dtype, device=device), indexing="ij"
        )
        size = torch.stack((valid[:, 0, :].sum(1), valid[:, :, 0].sum(1)), dim=-1).to(dtype)
        centre = (torch.stack((x, y), dim=-1)[None] + 0.5) / size[:, None, None]
        anchors.append(torch.cat((centre, torch.full_like(centre, 0.05 * 2.0**level)), dim=-1).flatten(1, 2))
    anchor = torch.cat(anchors, dim=1)
    is_usable = ((anchor > 0.01) & (anchor < 0.99)).all(-1)
    return torch.log(anchor / (1 - anchor)), is_usable
