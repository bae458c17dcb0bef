"""DETR, from which Deformable DETR descends. Source: arXiv:2005.12872 and its authors' code.

# B batch, Q queries, S positions of the one map, C channels, K classes, H, W image height and width
Tensor names are the authors', with the trunk as ``backbone.``; layer-norms are numbered in the order they run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr_cli.model.attention import CrossAttention, SelfAttention
from ddetr_cli.model.backbone import BACKBONES, ResNet
from ddetr_cli.model.detector import BoxHead, DetectionModel, DetectorOutput
from ddetr_cli.model.dropout import Dropout
from ddetr_cli.model.position import sine_position
from ddetr_cli.presets import ModelConfig


class EncoderLayer(nn.Module):
    """Self-attention over the map, then a feed-forward network; norms follow the sums."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.self_attn = SelfAttention(C, config.heads, config.dropout)
        self.norm1 = nn.LayerNorm(C)
        self.linear1 = nn.Linear(C, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, C)
        self.norm2 = nn.LayerNorm(C)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, position: Tensor, is_padding: Tensor | None) -> Tensor:
        """(B,S,C) -> (B,S,C)."""
        x = self.norm1(x + self.dropout(self.self_attn(x, position, is_padding)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Self-attention among queries, attention into the map, feed-forward; norms follow the sums."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.self_attn = SelfAttention(C, config.heads, config.dropout)
        self.norm1 = nn.LayerNorm(C)
        self.multihead_attn = CrossAttention(C, config.heads, config.dropout)
        self.norm2 = nn.LayerNorm(C)
        self.linear1 = nn.Linear(C, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, C)
        self.norm3 = nn.LayerNorm(C)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, position: Tensor, key: Tensor, memory: Tensor, is_padding: Tensor | None) -> Tensor:
        """(B,Q,C) -> (B,Q,C); key (B,S,C) is the memory (B,S,C) with its positions."""
        x = self.norm1(x + self.dropout(self.self_attn(x, position)))
        x = self.norm2(x + self.dropout(self.multihead_attn(x + position, key, memory, is_padding)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm3(x + self.dropout(self.linear2(hidden)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The encoder's layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.encoder_layers)])


class Decoder(nn.Module):
    """The decoder's layers, and the norm that follows each of them on the way to the heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.decoder_layers)])
        self.norm = nn.LayerNorm(config.hidden_dim)


class Transformer(nn.Module):
    """Encoder and decoder; every matrix starts Xavier-uniform."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, position: Tensor, query_position: Tensor, is_padding: Tensor | None) -> list[Tensor]:
        """One normed (B,Q,C) per decoder layer of a map x (B,S,C), positions (B,S,C), query positions (Q,C)."""
        for layer in self.encoder.layers:
            x = layer(x, position, is_padding)
        query_position = query_position.expand(x.shape[0], -1, -1)
        query = torch.zeros_like(query_position)
        key = x + position
        hidden = []
        for layer in self.decoder.layers:
            query = layer(query, query_position, key, x, is_padding)
            hidden.append(self.decoder.norm(query))
        return hidden


class Detr(DetectionModel):
    """DETR of one configuration, initialised as its authors do. Its logits have one class more: "no object"."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        C = config.hidden_dim
        self.backbone: ResNet = ResNet(BACKBONES[config.backbone], dilation=config.dilation)
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], C, 1)
        self.transformer = Transformer(config)
        self.query_embed = nn.Embedding(config.queries, C)
        self.class_embed = nn.Linear(C, config.classes + 1)
        self.bbox_embed = BoxHead(C)

    def forward(self, pixels: Tensor, is_padding: Tensor | None = None) -> DetectorOutput:
        """Predict for normalised pixels (B,3,H,W) with padding (B,H,W), True = padding, or None for none."""
        feature_map = self.input_proj(self.backbone(pixels)[-1])
        B, C, h, w = feature_map.shape
        if is_padding is None:
            padding = torch.zeros(B, h, w, dtype=torch.bool, device=pixels.device)
        else:
            padding = F.interpolate(is_padding[:, None].float(), size=(h, w), mode="nearest")[:, 0].bool()
        dtype = torch.float64 if pixels.dtype == torch.float64 else torch.float32
        position = sine_position(padding, C, shift=0.0, dtype=dtype)
        hidden = self.transformer(
            feature_map.flatten(2).transpose(1, 2),
            position.flatten(2).transpose(1, 2).to(feature_map.dtype),
            self.query_embed.weight,
            None if is_padding is None else padding.flatten(1),
        )
        pairs = [(self.class_embed(x), self.bbox_embed(x).sigmoid()) for x in hidden[0 if self.training else -1 :]]
        logits, boxes = pairs.pop()
        return DetectorOutput(logits, boxes, aux=pairs)
