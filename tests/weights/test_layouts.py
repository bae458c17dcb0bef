from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ddetr_cli.errors import CheckpointError
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import DEFORMABLE_DETR, DETR, FASTER_RCNN, PRESETS
from ddetr_cli.weights.layouts import (
    AUTHORS,
    DETREX,
    HUGGING_FACE,
    MMDETECTION,
    OURS,
    TORCHVISION,
    is_counter,
    recognise,
    to_ours,
)

SAMPLING = "encoder.layers.0.self_attn.sampling_offsets.bias"


@pytest.mark.parametrize(
    ("names", "layout", "family"),
    [
        (["backbone.0.body.conv1.weight", f"transformer.{SAMPLING}"], AUTHORS, DEFORMABLE_DETR),
        (["model.backbone.conv_encoder.model.conv1.weight", f"model.{SAMPLING}"], HUGGING_FACE, DEFORMABLE_DETR),
        (["model.backbone.model.conv1.weight", f"model.{SAMPLING}"], HUGGING_FACE, DEFORMABLE_DETR),
        (["backbone.conv1.weight", f"transformer.{SAMPLING}"], OURS, DEFORMABLE_DETR),
        (["backbone.stem.conv1.weight", "transformer.encoder.layers.0.attentions.0.sampling_offsets.bias"],
         DETREX, DEFORMABLE_DETR),
        (["backbone.conv1.weight", SAMPLING, "bbox_head.cls_branches.0.bias"], MMDETECTION, DEFORMABLE_DETR),
        (["backbone.0.body.conv1.weight", "transformer.decoder.layers.0.multihead_attn.in_proj_bias"], AUTHORS, DETR),
        (["backbone.conv1.weight", "transformer.decoder.layers.0.multihead_attn.in_proj_bias"], OURS, DETR),
        (["model.backbone.conv_encoder.model.conv1.weight", "model.decoder.layers.0.encoder_attn.q_proj.bias"],
         HUGGING_FACE, DETR),
        (["backbone.body.conv1.weight", "roi_heads.box_predictor.cls_score.bias"], TORCHVISION, FASTER_RCNN),
    ],
)  # fmt: skip
def test_layout_and_family_are_recognised_from_names(names: list[str], layout: str, family: str):
    assert recognise(names) == (layout, family)
    assert recognise(reversed(names)) == (layout, family)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["backbone.0.body.conv1.weight", "transformer.encoder.layers.0.self_attn.in_proj_bias"],
        # DETR and others of these two, which are not read
        ["backbone.stem.conv1.weight", "transformer.decoder.layers.0.multihead_attn.in_proj_bias"],
        ["backbone.conv1.weight", "decoder.layers.0.cross_attn.attn.in_proj_bias", "bbox_head.reg_branches.0.0.bias"],
        # A file of mmdetection 2
        ["backbone.conv1.weight", f"bbox_head.transformer.{SAMPLING}", "bbox_head.fc_cls.bias"],
    ],
)
def test_what_is_not_read_is_not_recognised(names: list[str]):
    assert recognise(names) is None


def test_copies_that_agree_are_merged_and_copies_that_differ_refused():
    same = {
        "bbox_embed.0.layers.0.bias": torch.ones(2),
        "transformer.decoder.bbox_embed.0.layers.0.bias": torch.ones(2),
    }
    merged, decoder_has_heads = to_ours(same, AUTHORS, DEFORMABLE_DETR)
    assert list(merged) == ["bbox_embed.0.layers.0.bias"] and decoder_has_heads
    same["transformer.decoder.bbox_embed.0.layers.0.bias"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="differs from its copy"):
        to_ours(same, AUTHORS, DEFORMABLE_DETR)


@pytest.mark.parametrize(
    ("layout", "family", "name"),
    [
        (AUTHORS, DEFORMABLE_DETR, "backbone.0.body.bn1"),
        (AUTHORS, DETR, "backbone.0.body.bn1"),
        (HUGGING_FACE, DEFORMABLE_DETR, "model.backbone.conv_encoder.model.bn1"),
        (HUGGING_FACE, DETR, "model.backbone.conv_encoder.model.bn1"),
        (DETREX, DEFORMABLE_DETR, "backbone.stem.conv1.norm"),
        (MMDETECTION, DEFORMABLE_DETR, "backbone.bn1"),
    ],
)
def test_counters_of_training_tools_are_left_out_in_every_layout(layout: str, family: str, name: str):
    stored = {f"{name}.{counter}": torch.zeros(1) for counter in ("num_batches_tracked", "total_ops", "total_params")}
    assert list(to_ours({**stored, f"{name}.bias": torch.ones(1)}, layout, family)[0]) == ["backbone.bn1.bias"]


def test_torchvisions_names_stay_as_they_are():
    stored = {"backbone.body.conv1.weight": torch.ones(1), "backbone.body.bn1.num_batches_tracked": torch.ones(1)}
    assert list(to_ours(stored, TORCHVISION, FASTER_RCNN)[0]) == ["backbone.body.conv1.weight"]


def test_the_small_trunks_counters_stay_in_our_own_layout():
    with torch.device("meta"):
        state = build_detector(replace(PRESETS["tiny"], encoder_layers=1, decoder_layers=1)).state_dict()
    assert to_ours(state, OURS, DEFORMABLE_DETR)[0].keys() == state.keys()
    assert any(is_counter(name) for name in state)
