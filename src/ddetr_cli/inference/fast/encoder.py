"""The encoder on the dense kernels: merged projections, fused norms, positions as tables of lines and columns.

# S positions over all levels, M heads, C channels; one image at a time
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ddetr_cli.inference.fast.workspace import Place, Plan, Step
from ddetr_cli.model.attention import DeformableAttention
from ddetr_cli.model.detector import DeformableDetr
from ddetr_cli.model.position import sine_position
from ddetr_cli.model.transformer import DecoderLayer, EncoderLayer, encoder_reference
from ddetr_cli.ops import msda_fused
from ddetr_cli.ops.dense import DenseEngine, Packed

Norm = tuple[Tensor, Tensor]


def pack_linears(engine: DenseEngine, *linears: nn.Linear) -> Packed:
    """Linear layers of one input as one."""
    weight, bias = torch.cat([linear.weight.detach() for linear in linears]), [linear.bias for linear in linears]
    return engine.pack(weight, torch.cat([b.detach() for b in bias]))


def _norm(norm: nn.LayerNorm) -> Norm:
    return norm.weight.detach().float().clone(), norm.bias.detach().float().clone()


class Layer:
    """What an encoder and a decoder layer share: deformable attention, then a feed-forward network."""

    def __init__(
        self,
        engine: DenseEngine,
        attention: DeformableAttention,
        layer: EncoderLayer | DecoderLayer,
        norm2: nn.LayerNorm,
    ) -> None:
        self.heads = attention.heads
        self.value = pack_linears(engine, attention.value_proj)
        self.projection = pack_linears(engine, attention.sampling_offsets, attention.attention_weights)
        self.output = pack_linears(engine, attention.output_proj)
        self.linear1, self.linear2 = pack_linears(engine, layer.linear1), pack_linears(engine, layer.linear2)
        self.norms = _norm(layer.norm1), _norm(norm2)
        self.epsilon = layer.norm1.eps

    def feed_forward(self, plan: Plan, sampled: Tensor, x: Tensor) -> Step:
        """The layer after its sampling, over ``x``."""
        return plan.engine.feed_forward(
            plan.crew, self.output, self.linear1, self.linear2, *self.norms, self.epsilon, sampled, x, x
        )


class Encoder:
    """The encoder's layers, packed."""

    def __init__(self, engine: DenseEngine, model: DeformableDetr) -> None:
        transformer = model.transformer
        self.channels = model.config.hidden_dim
        self.layers = [
            Layer(engine, layer.self_attn, layer, layer.norm2)
            for layer in transformer.encoder.layers
            if isinstance(layer, EncoderLayer)
        ]
        self.level_embed = transformer.level_embed.detach().float().clone()

    def add_to(self, plan: Plan, level_hw: Sequence[int], memory: Place) -> None:
        """Let ``plan`` refine ``memory`` (S,C) in place."""
        plan.part = "encoder"
        S, C = memory.shape
        value, sampled = plan.place("value", S, C), plan.place("sampled", S, C)
        projected = plan.place("projected", S, self.layers[0].projection.columns, dtype=torch.float32)
        positions = self._positions(level_hw)
        valid = torch.ones(1, len(level_hw) // 2, 2)
        reference = encoder_reference(level_hw, valid).contiguous()
        for layer in self.layers:
            plan.add(partial(self._prepare_inputs, plan, layer, level_hw, positions, memory, value, projected))
            plan.add(partial(self._prepare_sampling, plan, layer, level_hw, reference, value, projected, sampled))
            plan.add(partial(self._prepare_feed_forward, plan, layer, sampled, memory))

    def _prepare_inputs(
        self,
        plan: Plan,
        layer: Layer,
        level_hw: Sequence[int],
        positions: tuple[Tensor, Tensor],
        memory: Place,
        value: Place,
        projected: Place,
    ) -> Step:
        return plan.engine.attention_inputs(
            plan.crew,
            layer.value,
            layer.projection,
            plan.tensor(memory),
            positions,
            level_hw,
            plan.tensor(value),
            plan.tensor(projected),
            heads=value_heads(plan.engine, self.channels, layer.heads),
        )

    def _prepare_sampling(
        self,
        plan: Plan,
        layer: Layer,
        level_hw: Sequence[int],
        reference: Tensor,
        value: Place,
        projected: Place,
        sampled: Place,
    ) -> Step:
        parts = value_heads(plan.engine, self.channels, layer.heads)
        values, sizes = value_view(plan.tensor(value), layer.heads, parts), list(level_hw)
        projections, to = plan.tensor(projected).unsqueeze(0), plan.tensor(sampled).unsqueeze(0)
        return lambda: msda_fused(values, sizes, reference, projections, out=to)

    def _prepare_feed_forward(self, plan: Plan, layer: Layer, sampled: Place, memory: Place) -> Step:
        return layer.feed_forward(plan, plan.tensor(sampled), plan.tensor(memory))

    def _positions(self, level_hw: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Encodings of all lines (sum of heights, C/2) and columns (sum of widths, C/2), level embedding added.

        Where nothing is padded, half of a pixel's encoding depends on its line alone and half on its column.
        """
        half = self.channels // 2
        lines, columns = [], []
        for embed, h, w in zip(self.level_embed, level_hw[0::2], level_hw[1::2], strict=True):
            line = sine_position(torch.zeros(1, h, 1, dtype=torch.bool), self.channels)[0, :half, :, 0]
            column = sine_position(torch.zeros(1, 1, w, dtype=torch.bool), self.channels)[0, half:, 0]
            lines.append(line.T + embed[:half])
            columns.append(column.T + embed[half:])
        return torch.cat(lines).contiguous(), torch.cat(columns).contiguous()


def value_heads(engine: DenseEngine, channels: int, heads: int) -> int:
    """How many parts values are stored in: head by head, which samples fastest, where a head is whole panels."""
    return heads if channels // heads % engine.form.panel == 0 else 1


def value_view(value: Tensor, heads: int, parts: int) -> Tensor:
    """Values (S,C), stored in so many parts, as the op takes them: (1,S,M,D)."""
    S, C = value.shape
    if parts == 1:
        return value.view(1, S, heads, C // heads)
    return value.view(heads, S, C // heads).permute(1, 0, 2).unsqueeze(0)
