"""Deformable DETR rearranged for inference on a GPU, in plain PyTorch: the same numbers in fewer, larger steps.

# B batch, S positions over all levels, Q queries, M heads, D channels per head, C = M*D, L levels, N decoder layers

Batch-norms are folded into convolutions, which run on channels-last maps; offsets and attention weights are one
matrix product, the values of all decoder layers another; softmax, locations and sampling are one kernel; positions
and reference points of a picture size are kept. The proposals of a first stage are ranked by the one class that ranks
them, and only the best get a box. For pictures without padding, as ``Predictor`` makes them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr_cli.inference.fast.trunk import fold
from ddetr_cli.model.attention import DeformableAttention
from ddetr_cli.model.backbone import BasicBlock, Bottleneck, ResNet
from ddetr_cli.model.detector import DeformableDetr, DetectorOutput
from ddetr_cli.model.position import encode_coordinate, sine_position
from ddetr_cli.model.transformer import (
    GEOMETRY,
    DecoderLayer,
    DeformableTransformer,
    EncoderLayer,
    anchor_logits,
    encoder_reference,
    refine_boxes,
)
from ddetr_cli.ops import msda_fused

# Picture sizes whose positions are kept, a few megabytes each.
_MOST_SIZES = 32


@dataclass(frozen=True)
class _Constants:
    """What depends on the size of the picture alone."""

    level_hw: list[int]
    position: Tensor  # (1,S,C), level embeddings included
    reference: Tensor  # (1,S,L,2)
    anchors: Tensor  # (1,S,4) of the first stage, as logits; infinite where a position proposes nothing


class DerivedDetector(nn.Module):
    """Called like ``model``, with its weights as they are now in ``dtype``; geometry and heads stay in float32.

    ``constants`` is what the last run read besides weights and pixels: who repeats the run keeps it.
    """

    constants: _Constants

    def __init__(self, model: DeformableDetr, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = model.config, dtype
        self.backbone = _folded(model.backbone).to(dtype).to(memory_format=torch.channels_last)
        self.input_proj = copy.deepcopy(model.input_proj).to(dtype).to(memory_format=torch.channels_last)
        transformer = model.transformer
        encoder = [layer for layer in transformer.encoder.layers if isinstance(layer, EncoderLayer)]
        decoder = [layer for layer in transformer.decoder.layers if isinstance(layer, DecoderLayer)]
        self.encoder = nn.ModuleList([_EncoderLayer(layer).to(dtype) for layer in encoder])
        self.decoder = nn.ModuleList([_DecoderLayer(layer).to(dtype) for layer in decoder])
        self.decoder_values = _merged(*(layer.cross_attn.value_proj for layer in decoder)).to(dtype)
        self.class_embed, self.bbox_embed = copy.deepcopy(model.class_embed), copy.deepcopy(model.bbox_embed)
        self.level_embed = copy.deepcopy(transformer.level_embed)
        self.start: _Learned | _Proposed
        if model.config.two_stage:
            self.start = _Proposed(transformer, self.class_embed[-1], self.bbox_embed[-1], dtype)
        else:
            self.start = _Learned(transformer, model.query_embed.weight, dtype)
        self._known: dict[tuple[int, ...], _Constants] = {}
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> DetectorOutput:
        """Predict for normalised pixels (B,3,H,W) without padding."""
        maps = self._feature_maps(pixels.to(self.dtype, memory_format=torch.channels_last))
        constants = self.constants = self._constants_of(maps)
        level_hw, B, heads = constants.level_hw, pixels.shape[0], self.config.heads
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        reference = constants.reference.expand(B, -1, -1, -1)
        for layer in self.encoder:
            x = layer(x, constants.position, reference, level_hw)

        values = self.decoder_values(x).unflatten(-1, (len(self.decoder), heads, -1))  # (B,S,N,M,D)
        current, query_position, hidden = self.start(x, constants.anchors)
        boxes = current
        for i, layer in enumerate(self.decoder):
            around = current[:, :, None].expand(-1, -1, self.config.levels, -1)
            hidden = layer(hidden, query_position, around, values[:, :, i], level_hw)
            is_last = i == len(self.decoder) - 1
            if self.config.refine_boxes or is_last:
                head = i if self.config.refine_boxes else 0
                boxes = refine_boxes(self.bbox_embed[head](hidden.float()), current)
                current = boxes
        head = len(self.decoder) - 1 if self.config.refine_boxes else 0
        return DetectorOutput(self.class_embed[head](hidden.float()), boxes)

    def _feature_maps(self, pixels: Tensor) -> list[Tensor]:
        """L projected maps (B,C,h,w), as the model makes them."""
        trunk = self.backbone(pixels)[-1:] if self.config.levels == 1 else self.backbone(pixels)
        maps = [projection(m) for projection, m in zip(self.input_proj, trunk, strict=False)]
        for level in range(len(trunk), self.config.levels):
            maps.append(self.input_proj[level](trunk[-1] if level == len(trunk) else maps[-1]))
        return maps

    def _constants_of(self, maps: list[Tensor]) -> _Constants:
        level_hw = [side for m in maps for side in (m.shape[-2], m.shape[-1])]
        key = tuple(level_hw)
        if key not in self._known:
            if len(self._known) >= _MOST_SIZES:
                self._known.pop(next(iter(self._known)))
            device = maps[0].device
            paddings = [torch.zeros(1, *m.shape[-2:], dtype=torch.bool, device=device) for m in maps]
            encoded = [sine_position(p, self.config.hidden_dim).flatten(2).transpose(1, 2) for p in paddings]
            position = torch.cat([e + self.level_embed[i] for i, e in enumerate(encoded)], dim=1)
            whole = torch.ones(1, len(maps), 2, device=device)
            anchors, is_usable = anchor_logits(level_hw, paddings, GEOMETRY)
            self._known[key] = _Constants(
                level_hw,
                position.to(self.dtype),
                encoder_reference(level_hw, whole),
                anchors.masked_fill(~is_usable[..., None], torch.inf),
            )
        return self._known[key]


def can_derive(model: nn.Module) -> bool:
    """Whether ``DerivedDetector`` takes this model."""
    return isinstance(model, DeformableDetr)


class _Learned(nn.Module):
    """Where the decoder starts in models of one stage: the same for every picture."""

    reference: Tensor
    position: Tensor
    content: Tensor

    def __init__(self, transformer: DeformableTransformer, query_embed: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        position, content = query_embed.detach().chunk(2, dim=-1)
        reference = transformer.reference_points(position).float().sigmoid().detach()
        self.register_buffer("reference", reference.clone())
        self.register_buffer("position", position.to(dtype).clone())
        self.register_buffer("content", content.to(dtype).clone())

    def forward(self, memory: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """References (B,Q,2) in [0,1], query positions and contents (B,Q,C)."""
        B = len(memory)
        return self.reference.expand(B, -1, -1), self.position.expand(B, -1, -1), self.content.expand(B, -1, -1)


class _Proposed(nn.Module):
    """Where the decoder starts in models of two stages: at the best proposals of the encoder."""

    def __init__(
        self, transformer: DeformableTransformer, class_head: nn.Module, box_head: nn.Module, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config, self.dtype = transformer.config, dtype
        self.output = copy.deepcopy(transformer.enc_output).to(dtype)
        self.output_norm = copy.deepcopy(transformer.enc_output_norm).to(dtype)
        self.transform = copy.deepcopy(transformer.pos_trans).to(dtype)
        self.transform_norm = copy.deepcopy(transformer.pos_trans_norm).to(dtype)
        self.rank = nn.Linear(transformer.config.hidden_dim, 1)
        with torch.no_grad():
            self.rank.weight.copy_(class_head.get_parameter("weight")[:1])
            self.rank.bias.copy_(class_head.get_parameter("bias")[:1])
        self.box_head = box_head

    def forward(self, memory: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """References (B,Q,4) in [0,1], query positions and contents (B,Q,C)."""
        C = memory.shape[-1]
        features = self.output_norm(self.output(memory.masked_fill(anchors[..., :1].isinf(), 0.0)))
        best = self.rank(features.float())[..., 0].topk(min(self.config.queries, memory.shape[1]), dim=1).indices
        chosen = features.gather(1, best[..., None].expand(-1, -1, C)).float()
        around = anchors.expand(len(memory), -1, -1).gather(1, best[..., None].expand(-1, -1, 4))
        reference = (self.box_head(chosen) + around).sigmoid()
        code = encode_coordinate(reference, C // 2).flatten(-2).to(self.dtype)
        position, content = self.transform_norm(self.transform(code)).chunk(2, dim=-1)
        return reference, position, content


def _merged(*linears: nn.Linear) -> nn.Linear:
    """Linear layers of one input as one."""
    merged = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears))
    with torch.no_grad():
        merged.weight.copy_(torch.cat([linear.weight for linear in linears]))
        merged.bias.copy_(torch.cat([linear.bias for linear in linears]))
    return merged


def _folded(backbone: ResNet) -> ResNet:
    """A copy whose convolutions have the batch-norms that follow them inside."""
    copied = copy.deepcopy(backbone)

    def fold_into(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
        weight, bias = fold(conv, norm)
        assert bias is not None
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        return conv

    copied.conv1, copied.bn1 = fold_into(copied.conv1, copied.bn1), nn.Identity()
    for block in copied.modules():
        if not isinstance(block, BasicBlock | Bottleneck):
            continue
        for number in range(1, 4 if isinstance(block, Bottleneck) else 3):
            conv = block.get_submodule(f"conv{number}")
            assert isinstance(conv, nn.Conv2d)
            fold_into(conv, block.get_submodule(f"bn{number}"))
            setattr(block, f"bn{number}", nn.Identity())
        if block.downsample is not None:
            conv = block.downsample[0]
            assert isinstance(conv, nn.Conv2d)
            block.downsample = nn.Sequential(fold_into(conv, block.downsample[1]), nn.Identity())
    return copied


class _Sampling(nn.Module):
    """Deformable attention behind its value: one projection, one kernel, one projection."""

    def __init__(self, attention: DeformableAttention) -> None:
        super().__init__()
        self.projection = _merged(attention.sampling_offsets, attention.attention_weights)
        self.output = copy.deepcopy(attention.output_proj)

    def forward(self, query: Tensor, reference: Tensor, value: Tensor, level_hw: list[int]) -> Tensor:
        """query (B,Q,C), reference (B,Q,L,2|4) float32, value (B,S,M,D) with gaps between positions or none."""
        sampled = msda_fused(value, level_hw, reference.contiguous(), self.projection(query).float())
        return self.output(sampled)  # type: ignore[no-any-return]


class _EncoderLayer(nn.Module):
    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__()
        self.heads = layer.self_attn.heads
        self.value, self.sampling = copy.deepcopy(layer.self_attn.value_proj), _Sampling(layer.self_attn)
        self.norm1, self.norm2 = copy.deepcopy(layer.norm1), copy.deepcopy(layer.norm2)
        self.linear1, self.linear2 = copy.deepcopy(layer.linear1), copy.deepcopy(layer.linear2)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, level_hw: list[int]) -> Tensor:
        value = self.value(x).unflatten(-1, (self.heads, -1))
        x = self.norm1(x + self.sampling(x + position, reference, value, level_hw))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))  # type: ignore[no-any-return]


class _DecoderLayer(nn.Module):
    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.self_attn, self.sampling = copy.deepcopy(layer.self_attn), _Sampling(layer.cross_attn)
        self.norm1, self.norm2, self.norm3 = (copy.deepcopy(n) for n in (layer.norm1, layer.norm2, layer.norm3))
        self.linear1, self.linear2 = copy.deepcopy(layer.linear1), copy.deepcopy(layer.linear2)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, value: Tensor, level_hw: list[int]) -> Tensor:
        x = self.norm2(x + self.self_attn(x, position))
        x = self.norm1(x + self.sampling(x + position, reference, value, level_hw))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))  # type: ignore[no-any-return]
