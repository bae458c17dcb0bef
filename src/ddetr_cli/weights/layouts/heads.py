"""Deformable DETR's class and box heads: one for all layers of the decoder, or one for each."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor


def head_count(tensors: Mapping[str, Tensor], kind: str) -> int:
    """How many ``class_embed`` or ``bbox_embed`` heads are stored under our names."""
    return len({match[1] for name in tensors if (match := re.match(rf"{kind}\.(\d+)\.", name))})


def heads_are_shared(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every box head and every class head equals the first of its kind."""
    for name, tensor in tensors.items():
        if match := re.match(r"(class_embed|bbox_embed)\.\d+\.(.+)", name):
            first = tensors.get(f"{match[1]}.0.{match[2]}")
            if first is None or not torch.equal(first, tensor):
                return False
    return True


def one_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the repetitions of a head that all layers share."""
    return {name: t for name, t in tensors.items() if not re.match(r"(class_embed|bbox_embed)\.[1-9]\d*\.", name)}


def every_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a class head for every box head, where only the first was stored.

    transformers 5 shares the class head among the layers of a refining model, and safetensors keeps one of it.
    """
    heads = range(1, head_count(tensors, "bbox_embed"))
    if head_count(tensors, "class_embed") != 1:
        return dict(tensors)
    copies = {
        f"class_embed.{head}.{part}": tensors[f"class_embed.0.{part}"]
        for head in heads
        for part in ("weight", "bias")
        if f"class_embed.0.{part}" in tensors
    }
    return {**tensors, **copies}


def repeated_heads(name: str, *, refine: bool, two_stage: bool, decoder_layers: int) -> list[str] | None:
    """Under which names the authors repeat a head of ours, the decoder's copies below ``decoder.``; None for no head.

    A shared head stands once for each layer of the decoder. Separate ones stand again in the decoder, which refines
    with the box heads and, in two stages, scores with the class heads.
    """
    head = re.match(r"(class_embed|bbox_embed)\.\d+\.(.+)", name)
    if head is None:
        return None
    if not refine:
        return [f"{head[1]}.{layer}.{head[2]}" for layer in range(decoder_layers)]
    return [name, f"decoder.{name}"] if head[1] == "bbox_embed" or two_stage else [name]
