from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddetr_cli.errors import CheckpointError
from ddetr_cli.model.detector import build_detector
from ddetr_cli.presets import PRESETS
from ddetr_cli.weights.layouts import (
    AUTHORS,
    HUGGING_FACE,
    OURS,
    every_head,
    heads_are_shared,
    is_counter,
    one_head,
    recognise,
    to_authors,
    to_ours,
)

# Tensors in a checkpoint of the authors' code, counted with their code.
KEYS = {"r50": 561, "r50-refine": 597, "r50-two-stage": 630, "r50-single-scale": 549, "r50-single-scale-dc5": 549}


def _state(preset: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_detector(PRESETS[preset]).state_dict()


@pytest.mark.parametrize("preset", list(KEYS))
def test_the_authors_layout_has_as_many_tensors_as_their_checkpoints(preset: str):
    assert len(to_authors(_state(preset), PRESETS[preset])) == KEYS[preset]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("backbone.conv1.weight", "backbone.0.body.conv1.weight"),
        ("backbone.layer4.2.bn3.running_var", "backbone.0.body.layer4.2.bn3.running_var"),
        ("input_proj.3.1.bias", "input_proj.3.1.bias"),
        ("transformer.level_embed", "transformer.level_embed"),
        ("transformer.decoder.layers.5.norm3.weight", "transformer.decoder.layers.5.norm3.weight"),
        ("class_embed.6.weight", "transformer.decoder.class_embed.6.weight"),
        ("bbox_embed.0.layers.2.bias", "transformer.decoder.bbox_embed.0.layers.2.bias"),
    ],
)  # fmt: skip
def test_names_go_to_the_authors_and_back(ours: str, theirs: str):
    tensor = torch.ones(1)
    written = to_authors({ours: tensor}, PRESETS["r50-two-stage"])
    assert theirs in written
    assert list(to_ours(written, AUTHORS)[0]) == [ours]


@pytest.mark.parametrize(
    ("v4", "v5", "ours"),
    [
        ("model.backbone.conv_encoder.model.layer1.0.downsample.0.weight",
         "model.backbone.model.layer1.0.downsample.0.weight", "backbone.layer1.0.downsample.0.weight"),
        ("model.input_proj.0.0.weight", "model.input_proj.0.0.weight", "input_proj.0.0.weight"),
        ("model.query_position_embeddings.weight", "model.query_position_embeddings.weight", "query_embed.weight"),
        ("model.level_embed", "model.level_embed", "transformer.level_embed"),
        ("model.reference_points.bias", "model.reference_points.bias", "transformer.reference_points.bias"),
        ("model.enc_output_norm.weight", "model.enc_output_norm.weight", "transformer.enc_output_norm.weight"),
        ("model.pos_trans.bias", "model.pos_trans.bias", "transformer.pos_trans.bias"),
        ("model.encoder.layers.1.fc1.weight", "model.encoder.layers.1.mlp.fc1.weight",
         "transformer.encoder.layers.1.linear1.weight"),
        ("model.decoder.layers.1.fc2.bias", "model.decoder.layers.1.mlp.fc2.bias",
         "transformer.decoder.layers.1.linear2.bias"),
        ("model.encoder.layers.0.self_attn_layer_norm.bias", "model.encoder.layers.0.self_attn_layer_norm.bias",
         "transformer.encoder.layers.0.norm1.bias"),
        ("model.encoder.layers.0.final_layer_norm.bias", "model.encoder.layers.0.final_layer_norm.bias",
         "transformer.encoder.layers.0.norm2.bias"),
        ("model.decoder.layers.0.self_attn_layer_norm.bias", "model.decoder.layers.0.self_attn_layer_norm.bias",
         "transformer.decoder.layers.0.norm2.bias"),
        ("model.decoder.layers.0.encoder_attn_layer_norm.bias", "model.decoder.layers.0.encoder_attn_layer_norm.bias",
         "transformer.decoder.layers.0.norm1.bias"),
        ("model.decoder.layers.0.final_layer_norm.bias", "model.decoder.layers.0.final_layer_norm.bias",
         "transformer.decoder.layers.0.norm3.bias"),
        ("model.decoder.layers.0.encoder_attn.value_proj.bias", "model.decoder.layers.0.encoder_attn.value_proj.bias",
         "transformer.decoder.layers.0.cross_attn.value_proj.bias"),
        ("model.decoder.layers.0.self_attn.out_proj.bias", "model.decoder.layers.0.self_attn.o_proj.bias",
         "transformer.decoder.layers.0.self_attn.out_proj.bias"),
        ("model.encoder.layers.0.self_attn.output_proj.bias", "model.encoder.layers.0.self_attn.output_proj.bias",
         "transformer.encoder.layers.0.self_attn.output_proj.bias"),
        ("model.decoder.bbox_embed.3.layers.0.bias", "bbox_embed.3.layers.0.bias", "bbox_embed.3.layers.0.bias"),
        ("model.decoder.class_embed.3.bias", "class_embed.3.bias", "class_embed.3.bias"),
    ],
)  # fmt: skip
def test_hugging_faces_names_old_and_new_become_ours(v4: str, v5: str, ours: str):
    for name in (v4, v5):
        assert list(to_ours({name: torch.ones(1)}, HUGGING_FACE)[0]) == [ours]


def test_query_key_and_value_matrices_are_joined_in_that_order():
    prefix = "model.decoder.layers.2.self_attn."
    stored = {f"{prefix}{k}_proj.weight": torch.full((2, 2), float(i)) for i, k in ((2, "v"), (0, "q"), (1, "k"))}
    joined, _ = to_ours(stored, HUGGING_FACE)
    assert list(joined) == ["transformer.decoder.layers.2.self_attn.in_proj_weight"]
    assert joined["transformer.decoder.layers.2.self_attn.in_proj_weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_missing_third_of_self_attention_is_not_papered_over():
    stored = {f"model.decoder.layers.2.self_attn.{k}_proj.bias": torch.zeros(2) for k in "qk"}
    joined, _ = to_ours(stored, HUGGING_FACE)
    assert "transformer.decoder.layers.2.self_attn.in_proj_bias" not in joined
    assert len(joined) == 2


def test_copies_that_agree_are_merged_and_copies_that_differ_refused():
    same = {
        "bbox_embed.0.layers.0.bias": torch.ones(2),
        "transformer.decoder.bbox_embed.0.layers.0.bias": torch.ones(2),
    }
    merged, decoder_has_heads = to_ours(same, AUTHORS)
    assert list(merged) == ["bbox_embed.0.layers.0.bias"] and decoder_has_heads
    same["transformer.decoder.bbox_embed.0.layers.0.bias"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="differs from its copy"):
        to_ours(same, AUTHORS)


def test_layouts_are_recognised_by_their_trunk():
    attention = "encoder.layers.0.self_attn.sampling_offsets.bias"
    assert recognise(["backbone.0.body.conv1.weight", f"transformer.{attention}"]) == AUTHORS
    assert recognise(["model.backbone.conv_encoder.model.conv1.weight", f"model.{attention}"]) == HUGGING_FACE
    assert recognise(["model.backbone.model.conv1.weight", f"model.{attention}"]) == HUGGING_FACE
    assert recognise(["backbone.conv1.weight", f"transformer.{attention}"]) == OURS
    assert recognise(["backbone.0.body.conv1.weight", "transformer.encoder.layers.0.self_attn.in_proj_bias"]) is None
    assert recognise([]) is None


def test_counters_of_training_tools_are_not_weights():
    assert all(
        is_counter(f"backbone.0.body.bn1.{name}") for name in ("num_batches_tracked", "total_ops", "total_params")
    )
    assert is_counter("total_ops") and not is_counter("bn1.weight")


def test_shared_heads_are_told_from_separate_ones():
    shared = {f"class_embed.{i}.bias": torch.ones(3) for i in range(6)}
    assert heads_are_shared(shared) and list(one_head(shared)) == ["class_embed.0.bias"]
    assert not heads_are_shared({**shared, "class_embed.4.bias": torch.zeros(3)})


def test_a_class_head_stored_once_serves_every_box_head():
    stored = {f"bbox_embed.{i}.layers.0.bias": torch.ones(1) for i in range(3)}
    stored |= {"class_embed.0.weight": torch.ones(2, 1), "class_embed.0.bias": torch.ones(2)}
    assert {f"class_embed.{i}.{p}" for i in range(3) for p in ("weight", "bias")} <= every_head(stored).keys()


def test_the_small_trunks_counters_stay_in_our_own_layout():
    with torch.device("meta"):
        state = build_detector(replace(PRESETS["tiny"], encoder_layers=1, decoder_layers=1)).state_dict()
    assert to_ours(state, OURS)[0].keys() == state.keys()
    assert any(is_counter(name) for name in state)
