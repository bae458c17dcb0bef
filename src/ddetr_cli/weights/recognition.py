"""From tensors to a configuration: which variant a file holds, read off its shapes and what is stored beside them.

Shapes give nearly everything. They cannot tell a dilated model of one scale from an undilated one, nor how heads and
points share their product, nor the number of queries of a two-stage model; those come from the authors' ``args`` or
Hugging Face's ``config.json``, else from what the published models use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from ddetr_cli.errors import CheckpointError
from ddetr_cli.presets import (
    DEFORMABLE_DETR,
    DETR,
    FASTER_RCNN,
    LARGEST_IMAGE_SIZE,
    PRESETS,
    SMALLEST_IMAGE_SIZE,
    ModelConfig,
)
from ddetr_cli.weights.facts import IMAGE_SIZE_KEY
from ddetr_cli.weights.layouts import head_count, heads_are_shared

# Our field <- (authors' argument, Hugging Face's field)
_FACTS: dict[str, tuple[str, ...]] = {
    "dilation": ("dilation",),
    "heads": ("nheads", "encoder_attention_heads"),
    "points": ("enc_n_points", "encoder_n_points"),
    "dropout": ("dropout",),
    "refine_boxes": ("with_box_refine",),
    "image_size": (IMAGE_SIZE_KEY,),
}
_PAIRS = (
    ("encoder_attention_heads", "decoder_attention_heads"),
    ("encoder_n_points", "decoder_n_points"),
    ("enc_n_points", "dec_n_points"),
)
_ARITHMETIC = {
    "activation_function": "relu",
    "position_embedding_type": "sine",
    "position_embedding": "sine",
    "pre_norm": False,
    # Of the trunk, where it is transformers' own ResNet.
    "hidden_act": "relu",
    "downsample_in_bottleneck": False,
    "downsample_in_first_stage": False,
    "output_stride": 32,
}
_LIMITS = {
    "levels": (1, 8), "hidden_dim": (32, 4096), "heads": (1, 64), "points": (1, 64), "encoder_layers": (1, 64),
    "decoder_layers": (1, 64), "ffn_dim": (1, 65536), "queries": (1, 100_000), "classes": (1, 100_000),
    "image_size": (SMALLEST_IMAGE_SIZE, LARGEST_IMAGE_SIZE),
}  # fmt: skip


def config_of(
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    family: str,
    decoder_has_heads: bool,
    preset: str | None,
) -> tuple[ModelConfig, list[str]]:
    """The configuration of tensors under our names, and sentences about what had to be assumed.

    ``facts`` are the authors' arguments or Hugging Face's configuration. With ``preset`` the variant is that one,
    with the class and query counts of the file; whether the tensors fit it is for the loader to see.
    """
    _check_facts(facts)
    known = {ours: facts[key] for ours, keys in _FACTS.items() for key in keys if _is_number(facts.get(key))}
    if preset is not None and PRESETS[preset].family != family:
        raise CheckpointError(
            f"preset {preset}: not what the file holds ({describe(tensors)}). Name another preset, or none."
        )
    if family == FASTER_RCNN:
        config = replace(PRESETS["fasterrcnn-r50-fpn"], classes=_classes(tensors, family))
    elif preset is not None:
        config = replace(
            PRESETS[preset],
            classes=_classes(tensors, family),
            queries=_queries(tensors, facts),
        )
    elif family == DETR:
        config = _named(_detr(tensors, known))
    else:
        config = _named(_deformable_detr(tensors, facts, known, decoder_has_heads=decoder_has_heads))
    if "image_size" in known:
        config = replace(config, image_size=known["image_size"])
    notes = []
    if "dilation" not in known and preset is None and config.levels == 1 and family != FASTER_RCNN:
        dilated = "detr-r50-dc5" if family == DETR else "r50-single-scale-dc5"
        notes.append(
            "nothing in or beside the file says whether the last stage is dilated, and its tensors cannot tell: "
            f"assumed not (--preset {dilated} if it is)"
        )
    return checked(config), notes


def _detr(tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> ModelConfig:
    hidden = _size(tensors, "input_proj.weight", 0)
    if hidden is None:
        raise _incomplete("input projection")
    return ModelConfig(
        preset="custom",
        family=DETR,
        dilation=bool(known.get("dilation", False)),
        levels=1,
        hidden_dim=hidden,
        heads=int(known.get("heads", 8)),
        encoder_layers=_layers(tensors, "encoder"),
        decoder_layers=_layers(tensors, "decoder"),
        ffn_dim=_size(tensors, "transformer.encoder.layers.0.linear1.weight", 0) or 2048,
        dropout=float(known.get("dropout", 0.1)),
        queries=_queries(tensors, {}),
        classes=_classes(tensors, DETR),
    )


def _deformable_detr(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], known: Mapping[str, Any], *, decoder_has_heads: bool
) -> ModelConfig:
    two_stage = "transformer.enc_output.weight" in tensors
    refine = two_stage or decoder_has_heads or not heads_are_shared(tensors)
    # A refining model nobody trained yet has equal heads: only what is stored beside them can tell.
    if head_count(tensors, "bbox_embed") > 1:
        refine = refine or bool(known.get("refine_boxes", False))
    levels = len({m[1] for name in tensors if (m := re.match(r"input_proj\.(\d+)\.0\.weight$", name))})
    hidden = _size(tensors, "transformer.level_embed", 1)
    product = _size(tensors, "transformer.encoder.layers.0.self_attn.attention_weights.weight", 0)
    if not levels or hidden is None or product is None:
        raise _incomplete("input projections, level embeddings or attention")
    heads = int(known.get("heads", 8))
    return ModelConfig(
        preset="custom",
        dilation=bool(known.get("dilation", False)),
        levels=levels,
        hidden_dim=hidden,
        heads=heads,
        points=int(known.get("points", product // (heads * levels) if heads > 0 else 0)),
        encoder_layers=_layers(tensors, "encoder"),
        decoder_layers=_layers(tensors, "decoder"),
        ffn_dim=_size(tensors, "transformer.encoder.layers.0.linear1.weight", 0) or 1024,
        dropout=float(known.get("dropout", 0.1)),
        queries=_queries(tensors, facts),
        refine_boxes=refine,
        two_stage=two_stage,
        classes=_classes(tensors, DEFORMABLE_DETR),
    )


def _classes(tensors: Mapping[str, Tensor], family: str) -> int:
    """How many classes the heads have an output for, "no object" aside; COCO's 91 where there is no head."""
    if family == FASTER_RCNN:
        return _size(tensors, "roi_heads.box_predictor.cls_score.weight", 0) or 91
    if family == DETR:
        return (_size(tensors, "class_embed.weight", 0) or 92) - 1
    return _size(tensors, "class_embed.0.weight", 0) or 91


def _queries(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Any:
    """The number of queries; in two stages none is stored, and the facts are asked."""
    if (stored := _size(tensors, "query_embed.weight", 0)) is not None:
        return stored
    is_two_stage = "transformer.enc_output.weight" in tensors
    return facts.get("two_stage_num_proposals", facts.get("num_queries", 300)) if is_two_stage else 300


def _incomplete(what: str) -> CheckpointError:
    return CheckpointError(f"{what}: not in the file (parts of the model are missing). Give the whole checkpoint.")


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Refuse what the shapes of tensors do not show and our arithmetic does not do."""
    for here, there in _PAIRS:
        if here in facts and there in facts and facts[here] != facts[there]:
            raise CheckpointError(f"{here} and {there}: differ, which this model cannot. Give another checkpoint.")
    for key, wanted in _ARITHMETIC.items():
        if facts.get(key, wanted) != wanted:
            raise CheckpointError(
                f"{key}: is {str(facts[key])[:40]!r}, and only {wanted!r} is computed here. Give another checkpoint."
            )


def checked(config: ModelConfig) -> ModelConfig:
    """``config`` if every field has its type and a size that can be built, else CheckpointError naming the field."""
    for spec in fields(config):
        value, default = getattr(config, spec.name), getattr(PRESETS["r50"], spec.name)
        wanted = (int, float) if isinstance(default, float) else type(default)
        low, high = _LIMITS.get(spec.name, (None, None))
        is_sound = isinstance(value, wanted) and isinstance(value, bool) == isinstance(default, bool)
        if not is_sound or (low is not None and high is not None and not low <= value <= high):
            raise CheckpointError(
                f"model configuration: {spec.name} is {str(value)[:60]!r} (impossible). Give another file."
            )
    if config.hidden_dim % config.heads or config.hidden_dim % 32 or not 0 <= config.dropout < 1:
        raise CheckpointError(
            f"model configuration: {config.hidden_dim} channels do not divide by {config.heads} heads and 32 groups, "
            "or the dropout is outside [0,1). Give another file."
        )
    return config


def describe(tensors: Mapping[str, Tensor]) -> str:
    """In a few words, what the tensors of a recognised file look like, for messages about wrong weights."""
    if any(name.startswith("roi_heads.") for name in tensors):
        return "this is a Faster R-CNN"
    queries = _size(tensors, "query_embed.weight", 0)
    on = ", on a ResNet of more than 50 layers" if "backbone.layer3.6.conv1.weight" in tensors else ""
    if (outputs := _size(tensors, "class_embed.weight", 0)) is not None:
        return f"this is a DETR without deformable attention, {queries or 'no'} queries, {outputs - 1} classes{on}"
    levels = len({m[1] for name in tensors if (m := re.match(r"input_proj\.(\d+)\.0\.weight$", name))})
    words = ["single-scale" if levels == 1 else f"{levels}-level"]
    if "transformer.enc_output.weight" in tensors:
        words.append("two-stage")
    elif not heads_are_shared(tensors):
        words.append("box-refining")
    if queries is not None:
        words.append(f"{queries}-query")
    if (classes := _size(tensors, "class_embed.0.weight", 0)) is not None:
        words.append(f"{classes}-class")
    return f"this is a {', '.join(words)} model{on}"


def describe_foreign(names: Mapping[str, Tensor]) -> str:
    """What a file that is none of the systems seems to be, from its names alone."""

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    if not names:
        return "it holds no tensors"
    if has(r"^bbox_head\.transformer\."):
        return "this is a model of mmdetection 2, of which only version 3 is read"
    if has(r"^(bbox_head|neck)\."):
        return "this is another model of detrex or mmdetection"
    if has(r"^(fc|classifier|head)\.(weight|bias)$") or (has(r"^layer4\.") and has(r"^conv1\.")):
        return "this is an image classifier, which can only start a backbone"
    return f"its tensors are {', '.join(repr(name[:60]) for name in list(names)[:3])} ..."


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))


def _named(config: ModelConfig) -> ModelConfig:
    """``config`` under the name of the preset that has the same structure, where there is one."""
    free = {"preset", "classes", "queries", "image_size", "dropout"}
    for preset in PRESETS.values():
        if all(getattr(preset, f.name) == getattr(config, f.name) for f in fields(config) if f.name not in free):
            return replace(config, preset=preset.preset, image_size=preset.image_size)
    return config


def _size(tensors: Mapping[str, Tensor], name: str, dim: int) -> int | None:
    tensor = tensors.get(name)
    return tensor.shape[dim] if tensor is not None and tensor.dim() > dim else None


def _layers(tensors: Mapping[str, Tensor], part: str) -> int:
    pattern = re.compile(rf"transformer\.{part}\.layers\.(\d+)\.")
    return len({match[1] for name in tensors if (match := pattern.match(name))})
