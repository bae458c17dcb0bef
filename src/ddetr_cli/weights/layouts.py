"""Names of tensors: how the authors, Hugging Face and we call the same weights, and what a file's names reveal.

Ours are the authors' names with the trunk as ``backbone.`` and every shared tensor once:

* authors: ``backbone.0.body.``; heads repeated for each of the decoder's layers even where all layers share one, and
  again under ``transformer.decoder.`` where refinement or proposals use them.
* Hugging Face: ``model.`` before most names, other words for the same layers, self-attention in three matrices;
  v4 (every file on the hub) and v5 (its models in memory) differ in three words.

Any repetition may be absent from a file, and must agree with its first copy where present.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ddetr_cli.errors import CheckpointError
from ddetr_cli.presets import ModelConfig

OURS, AUTHORS, HUGGING_FACE = "ddetr", "authors' .pth", "Hugging Face"

# Counters that training tools leave among the weights and no computation reads.
_COUNTERS = ("total_ops", "total_params", "num_batches_tracked")

_HF_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.", ""),
        (r"^backbone\.(conv_encoder\.)?model\.", "backbone."),
        (r"^query_position_embeddings\.", "query_embed."),
        (r"^decoder\.(class_embed|bbox_embed)\.", r"\1."),
        (r"^(level_embed$|reference_points\.|enc_output|pos_trans)", r"transformer.\1"),
        (r"^(encoder|decoder)\.layers\.", r"transformer.\1.layers."),
        (r"\.(mlp\.)?fc([12])\.", r".linear\2."),
        (r"(\.encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
        (r"(\.encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
        (r"(\.decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm1."),
        (r"(\.decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
        (r"(\.decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
        (r"\.encoder_attn\.", ".cross_attn."),
        (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    )
)
_HF_THIRD = re.compile(r"^(transformer\.decoder\.layers\.\d+\.self_attn)\.([qkv])_proj\.(weight|bias)$")


def recognise(names: Iterable[str]) -> str | None:
    """Which layout a file's names belong to, or None where it is no layout read here."""
    known = set(names)
    if not any(".sampling_offsets." in name for name in known):
        return None
    for prefix, layout in (
        ("backbone.0.body.", AUTHORS),
        ("model.backbone.", HUGGING_FACE),
        ("backbone.conv1.", OURS),
    ):
        if any(name.startswith(prefix) for name in known):
            return layout
    return None


def is_counter(name: str) -> bool:
    """Whether a tensor is bookkeeping of a training tool, not a weight."""
    return name.rsplit(".", 1)[-1] in _COUNTERS


def to_ours(tensors: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], bool]:
    """Tensors under our names, heads still one per layer as far as stored; and whether the decoder had copies.

    Raises CheckpointError where two copies of one tensor differ.
    """
    ours: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    decoder_has_heads = False
    for name, tensor in tensors.items():
        if is_counter(name) and layout != OURS:
            continue
        decoder_has_heads |= bool(re.match(r"(model|transformer)\.decoder\.bbox_embed\.", name))
        new = name if layout == OURS else _from_authors(name) if layout == AUTHORS else _from_hugging_face(name)
        if third := _HF_THIRD.match(new):
            thirds.setdefault(f"{third[1]}.in_proj_{third[3]}", {})[third[2]] = tensor
        elif new in ours and not torch.equal(ours[new], tensor):
            raise CheckpointError(
                f"{name}: differs from its copy {new} in the same file (the model shares one tensor). "
                "Save the model again."
            )
        else:
            ours.setdefault(new, tensor)
    for name, parts in thirds.items():
        if len(parts) == 3:
            ours[name] = torch.cat([parts[key] for key in "qkv"])
        else:
            ours.update({f"{name} ({key} third)": part for key, part in parts.items()})
    return ours, decoder_has_heads


def _from_authors(name: str) -> str:
    name = name.replace("backbone.0.body.", "backbone.", 1) if name.startswith("backbone.0.body.") else name
    return re.sub(r"^transformer\.decoder\.(class_embed|bbox_embed)\.", r"\1.", name)


def _from_hugging_face(name: str) -> str:
    for pattern, replacement in _HF_RULES:
        name = pattern.sub(replacement, name)
    return name


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


def to_authors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors under the authors' names, with every repetition their checkpoints hold (SPEC of the key counts)."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if is_counter(name):
            continue
        head = re.match(r"(class_embed|bbox_embed)\.\d+\.(.+)", name)
        if head is None:
            out[name.replace("backbone.", "backbone.0.body.", 1) if name.startswith("backbone.") else name] = tensor
        elif config.refine_boxes:
            out[name] = tensor
            if head[1] == "bbox_embed" or config.two_stage:
                out[f"transformer.decoder.{name}"] = tensor
        else:
            for layer in range(config.decoder_layers):
                out[f"{head[1]}.{layer}.{head[2]}"] = tensor
    return out
