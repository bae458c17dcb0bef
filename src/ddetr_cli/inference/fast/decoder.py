"""The decoder on the dense kernels where it multiplies by weights; geometry and heads are the model's own modules.

# Q queries, S positions over all levels, C channels; one image at a time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddetr_cli.inference.fast.encoder import Layer, pack_linears, value_heads, value_view
from ddetr_cli.inference.fast.workspace import Place, Plan, Step
from ddetr_cli.model.detector import DeformableDetr, DetectorOutput
from ddetr_cli.model.position import encode_coordinate
from ddetr_cli.model.transformer import DecoderLayer, anchor_logits, refine_boxes
from ddetr_cli.ops import msda_fused
from ddetr_cli.ops.dense import DenseEngine

# Rows of the memory normalised at once for the proposals: so many stay in the cache.
_PROPOSAL_ROWS = 1024


class CrossLayer(Layer):
    """A decoder layer, packed: what it shares with an encoder layer, and self-attention."""

    def __init__(self, engine: DenseEngine, layer: DecoderLayer) -> None:
        super().__init__(engine, layer.cross_attn, layer, layer.norm3)
        weight, bias = layer.self_attn.in_proj_weight.detach(), layer.self_attn.in_proj_bias.detach()
        C = weight.shape[1]
        self.query_key = engine.pack(weight[: 2 * C], bias[: 2 * C])
        self.self_value = engine.pack(weight[2 * C :], bias[2 * C :])
        self.self_output = pack_linears(engine, layer.self_attn.out_proj)
        self.norm_self = layer.norm2


@dataclass(frozen=True)
class _Places:
    """Buffers of the decoder: element type where something is multiplied by weights, else float32."""

    x: Place  # (Q,C)
    stream: Place  # (Q,C), x as it is handed on: float32
    placed: Place  # (Q,C), x + position
    query_key: Place  # (Q,2C)
    self_value: Place  # (Q,C)
    mixed: Place  # (Q,C)
    self_output: Place  # (Q,C)
    projected: Place  # (Q,3*M*L*P)
    sampled: Place  # (Q,C)
    value: Place  # (S,C)
    memory: Place  # (S,C)
    features: Place | None  # (S,C), of the proposals


class Decoder:
    """The decoder and the heads of a model, packed."""

    def __init__(self, engine: DenseEngine, model: DeformableDetr) -> None:
        self.model = model
        self.layers = [
            CrossLayer(engine, layer) for layer in model.transformer.decoder.layers if isinstance(layer, DecoderLayer)
        ]
        self.propose = pack_linears(engine, model.transformer.enc_output) if model.config.two_stage else None

    def add_to(self, plan: Plan, level_hw: Sequence[int], memory: Place) -> None:
        """Let ``plan`` decode ``memory`` (S,C); that step returns the output, a batch of one."""
        plan.part = "decoder"
        S, C = memory.shape
        Q = min(self.model.config.queries, S) if self.propose else self.model.config.queries
        real = torch.float32
        places = _Places(
            x=plan.place("x", Q, C),
            stream=plan.place("stream", Q, C, dtype=real),
            placed=plan.place("placed", Q, C),
            query_key=plan.place("query key", Q, 2 * C, dtype=real),
            self_value=plan.place("self value", Q, C, dtype=real),
            mixed=plan.place("mixed", Q, C),
            self_output=plan.place("self output", Q, C, dtype=real),
            projected=plan.place("query projected", Q, self.layers[0].projection.columns, dtype=real),
            sampled=plan.place("query sampled", Q, C),
            value=plan.place("value", S, C),
            memory=memory,
            features=plan.place("projected", S, C, dtype=real) if self.propose else None,
        )
        plan.add(lambda: self._prepare(plan, places, list(level_hw)))

    def _prepare(self, plan: Plan, places: _Places, level_hw: list[int]) -> Step:
        model, config = self.model, self.model.config
        start = self._prepare_start(plan, places, level_hw)
        decode_layers = [self._prepare_layer(plan, places, layer, level_hw) for layer in self.layers]

        def decode() -> DetectorOutput:
            reference, position, x = start()
            for i, decode_layer in enumerate(decode_layers):
                x = decode_layer(x, position, reference)
                if config.refine_boxes or i == len(decode_layers) - 1:
                    head = i if config.refine_boxes else 0
                    boxes = refine_boxes(model.bbox_embed[head](x), reference)
                if config.refine_boxes:
                    reference = boxes
            return DetectorOutput(model.class_embed[head](x)[None], boxes[None])

        return decode

    def _prepare_layer(
        self, plan: Plan, places: _Places, layer: CrossLayer, level_hw: list[int]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """(x, position (Q,C), reference (Q,2 or 4)) -> x, all float32."""
        engine, crew = plan.engine, plan.crew
        (Q, C), heads, levels = places.x.shape, layer.heads, len(level_hw) // 2
        x_in, stream, placed = plan.tensor(places.x), plan.tensor(places.stream), plan.tensor(places.placed)
        mixed, sampled = plan.tensor(places.mixed), plan.tensor(places.sampled)
        query_key, self_value = plan.tensor(places.query_key), plan.tensor(places.self_value)
        self_output, projected = plan.tensor(places.self_output), plan.tensor(places.projected)
        memory, value = plan.tensor(places.memory), plan.tensor(places.value)
        # (1,M,Q,D)
        query, key = (t.unflatten(-1, (heads, -1)).transpose(0, 1)[None] for t in query_key.chunk(2, dim=-1))
        values = self_value.unflatten(-1, (heads, -1)).transpose(0, 1)[None]
        project_query_key = engine.linear(crew, layer.query_key, placed, query_key)
        project_self_value = engine.linear(crew, layer.self_value, x_in, self_value)
        project_self_output = engine.linear(crew, layer.self_output, mixed, self_output)
        parts = value_heads(engine, C, heads)
        project_value = engine.linear(crew, layer.value, memory, value, heads=parts)
        project = engine.linear(crew, layer.projection, placed, projected)
        feed_forward = layer.feed_forward(plan, sampled, stream)
        seen_value = value_view(value, heads, parts)

        def decode_layer(x: Tensor, position: Tensor, reference: Tensor) -> Tensor:
            placed.copy_(x + position)
            x_in.copy_(x)
            project_query_key()
            project_self_value()
            attended = F.scaled_dot_product_attention(query, key, values)[0]
            mixed.copy_(attended.transpose(0, 1).flatten(1))
            project_self_output()
            x = layer.norm_self(x + self_output)
            placed.copy_(x + position)
            stream.copy_(x)
            project()
            project_value()
            around = reference[None, :, None].expand(1, Q, levels, -1)
            msda_fused(seen_value, level_hw, around, projected[None], out=sampled[None])
            feed_forward()
            return stream.clone()

        return decode_layer

    def _prepare_start(
        self, plan: Plan, places: _Places, level_hw: list[int]
    ) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """() -> reference (Q,2 or 4) in [0,1], query positions (Q,C), query contents (Q,C)."""
        model, transformer = self.model, self.model.transformer
        if self.propose is None or places.features is None:
            position, content = model.query_embed.weight.detach().float().chunk(2, dim=-1)
            reference = transformer.reference_points(position).sigmoid()
            return lambda: (reference, position, content)

        features = plan.tensor(places.features)
        compute_features = plan.engine.linear(plan.crew, self.propose, plan.tensor(places.memory), features)
        sizes = zip(level_hw[0::2], level_hw[1::2], strict=True)
        no_padding = [torch.zeros(1, h, w, dtype=torch.bool) for h, w in sizes]
        anchors, is_usable = (t[0] for t in anchor_logits(level_hw, no_padding, torch.float32))
        anchors = anchors.masked_fill(~is_usable[..., None], float("inf"))
        unusable = (~is_usable).nonzero()[:, 0]
        class_head, box_head = model.class_embed[-1], model.bbox_embed[-1]
        weight, bias = class_head.get_parameter("weight")[:1], class_head.get_parameter("bias")[:1]
        rows, C = places.x.shape

        def propose() -> tuple[Tensor, Tensor, Tensor]:
            compute_features()
            # What the layer makes of zeros: the model blanks these positions before it.
            features.index_copy_(0, unusable, transformer.enc_output.bias.expand(len(unusable), -1))
            scores = torch.cat(
                [
                    F.linear(transformer.enc_output_norm(some), weight, bias)[:, 0]
                    for some in features.split(_PROPOSAL_ROWS)
                ]
            )
            best = scores.topk(rows).indices
            reference = (box_head(transformer.enc_output_norm(features[best])) + anchors[best]).sigmoid()
            code = encode_coordinate(reference, C // 2).flatten(-2)
            position, content = transformer.pos_trans_norm(transformer.pos_trans(code)).chunk(2, dim=-1)
            return reference, position, content

        return propose
