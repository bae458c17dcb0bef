"""Hugging Face's names for Deformable DETR and DETR, read as transformers 4 and 5 write them, written as 4 does.

``model.`` stands before most names, the layers have other words, and attention over pairs is three matrices where
the authors have one. Every file on the hub has the names of transformers 4; version 5 renames three words in memory
and reads both. The trunk is timm's, with torchvision's names, or (``use_timm_backbone=False``, the hub's ``no_timm``)
transformers' own ResNet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddetr_cli.presets import DEFORMABLE_DETR, DETR, ModelConfig
from ddetr_cli.weights.layouts.heads import repeated_heads
from ddetr_cli.weights.layouts.names import is_counter, renamed, rules

# Names of transformers 5 to those of 4; the copies of the heads in the decoder to the heads.
_TO_V4 = rules(
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"\.encoder_attn\.o_proj\.", ".encoder_attn.out_proj."),
    (r"^model\.decoder\.(class_embed|bbox_embed)\.", r"\1."),
)
# The trunk's names in transformers' own ResNet to timm's; none of these words is in another part of the model.
_TO_TIMM = rules(
    (r"\.embedder\.embedder\.convolution\.", ".conv1."),
    (r"\.embedder\.embedder\.normalization\.", ".bn1."),
    *((rf"\.encoder\.stages\.{n}\.layers\.(\d+)\.", rf".layer{n + 1}.\1.") for n in range(4)),
    *((rf"\.layer\.{n}\.convolution\.", f".conv{n + 1}.") for n in range(3)),
    *((rf"\.layer\.{n}\.normalization\.", f".bn{n + 1}.") for n in range(3)),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)
_IN_LAYER = re.compile(r"(.*\b(encoder|decoder)\.layers\.\d+\.)(\w+)(\..*)")
_JOINED = re.compile(r"(.+_attn)\.in_proj_(weight|bias)")
_THIRD = re.compile(r"(.+_attn)\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True)
class _Words:
    """Pairs (ours, theirs): beginnings of names, the first that fits; and the parts of a layer."""

    prefixes: tuple[tuple[str, str], ...]
    encoder: dict[str, str]
    decoder: dict[str, str]
    common: dict[str, str] = field(default_factory=lambda: {"linear1": "fc1", "linear2": "fc2"})

    def part(self, of: str) -> dict[str, str]:
        return self.common | (self.encoder if of == "encoder" else self.decoder)


_SHARED_PREFIXES = (
    ("backbone.", "model.backbone.conv_encoder.model."),
    ("query_embed.", "model.query_position_embeddings."),
)
_WORDS = {
    DEFORMABLE_DETR: _Words(
        (*_SHARED_PREFIXES, ("input_proj.", "model.input_proj."), ("transformer.", "model.")),
        encoder={"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
        # The authors number the decoder's norms across the order in which they come.
        decoder={
            "norm1": "encoder_attn_layer_norm",
            "norm2": "self_attn_layer_norm",
            "norm3": "final_layer_norm",
            "cross_attn": "encoder_attn",
        },
    ),
    DETR: _Words(
        (
            *_SHARED_PREFIXES,
            ("input_proj.", "model.input_projection."),
            ("class_embed.", "class_labels_classifier."),
            ("bbox_embed.", "bbox_predictor."),
            ("transformer.decoder.norm.", "model.decoder.layernorm."),
            ("transformer.", "model."),
        ),
        encoder={"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
        decoder={
            "norm1": "self_attn_layer_norm",
            "norm2": "encoder_attn_layer_norm",
            "norm3": "final_layer_norm",
            "multihead_attn": "encoder_attn",
        },
    ),
}


def from_hugging_face(name: str, family: str) -> str:
    """Our name for one of theirs; a third of an attention's matrix keeps its own, for ``joined``."""
    words = _WORDS[family]
    return _swapped(
        renamed(name, _TO_V4 + _TO_TIMM),
        [(theirs, ours) for ours, theirs in words.prefixes],
        {part: {theirs: ours for ours, theirs in words.part(part).items()} for part in ("encoder", "decoder")},
    )


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the query, key and value matrices of an attention stacked in that order.

    A third without the other two is left under a name that no model has.
    """
    out: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _THIRD.fullmatch(name):
            thirds.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            out[name] = tensor
    for name, parts in thirds.items():
        if len(parts) == 3:
            out[name] = torch.cat([parts[key] for key in "qkv"])
        else:
            out.update({f"{name} ({key} third)": part for key, part in parts.items()})
    return out


def to_hugging_face(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors under the names of transformers 4, with every repetition its state dict has."""
    words = _WORDS[config.family]
    parts = {part: words.part(part) for part in ("encoder", "decoder")}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if is_counter(name):
            continue
        heads = None
        if config.family == DEFORMABLE_DETR:
            heads = repeated_heads(
                name, refine=config.refine_boxes, two_stage=config.two_stage, decoder_layers=config.decoder_layers
            )
        if heads is not None:
            out.update({f"model.{head}" if head.startswith("decoder.") else head: tensor for head in heads})
        elif match := _JOINED.fullmatch(name):
            prefix = _swapped(f"{match[1]}.", words.prefixes, parts)
            for key, third in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{prefix}{key}_proj.{match[2]}"] = third
        else:
            out[_swapped(name, words.prefixes, parts)] = tensor
    return out


def _swapped(name: str, prefixes: Iterable[tuple[str, str]], parts: Mapping[str, Mapping[str, str]]) -> str:
    """``name`` with its beginning and the part of a layer it names in the other language."""
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if match := _IN_LAYER.fullmatch(name):
        name = f"{match[1]}{parts[match[2]].get(match[3], match[3])}{match[4]}"
    return name
