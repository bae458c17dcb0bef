from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import DEFORMABLE_DETR, DETR, PRESETS
from ddetr_cli.weights.layouts.huggingface import from_hugging_face, joined, to_hugging_face

DEFORMABLE_NAMES = [  # v4, v5, ours
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
    ("bbox_embed.3.layers.0.bias", "bbox_embed.3.layers.0.bias", "bbox_embed.3.layers.0.bias"),
    ("class_embed.3.bias", "class_embed.3.bias", "class_embed.3.bias"),
]  # fmt: skip
DETR_NAMES = [
    ("model.backbone.conv_encoder.model.bn1.bias", "model.backbone.model.bn1.bias", "backbone.bn1.bias"),
    ("model.input_projection.weight", "model.input_projection.weight", "input_proj.weight"),
    ("model.query_position_embeddings.weight", "model.query_position_embeddings.weight", "query_embed.weight"),
    ("model.encoder.layers.5.self_attn.out_proj.weight", "model.encoder.layers.5.self_attn.o_proj.weight",
     "transformer.encoder.layers.5.self_attn.out_proj.weight"),
    ("model.decoder.layers.5.encoder_attn.out_proj.weight", "model.decoder.layers.5.encoder_attn.o_proj.weight",
     "transformer.decoder.layers.5.multihead_attn.out_proj.weight"),
    ("model.encoder.layers.0.self_attn_layer_norm.bias", "model.encoder.layers.0.self_attn_layer_norm.bias",
     "transformer.encoder.layers.0.norm1.bias"),
    ("model.encoder.layers.0.fc2.bias", "model.encoder.layers.0.mlp.fc2.bias",
     "transformer.encoder.layers.0.linear2.bias"),
    ("model.decoder.layers.0.self_attn_layer_norm.bias", "model.decoder.layers.0.self_attn_layer_norm.bias",
     "transformer.decoder.layers.0.norm1.bias"),
    ("model.decoder.layers.0.encoder_attn_layer_norm.bias", "model.decoder.layers.0.encoder_attn_layer_norm.bias",
     "transformer.decoder.layers.0.norm2.bias"),
    ("model.decoder.layers.0.final_layer_norm.bias", "model.decoder.layers.0.final_layer_norm.bias",
     "transformer.decoder.layers.0.norm3.bias"),
    ("model.decoder.layernorm.weight", "model.decoder.layernorm.weight", "transformer.decoder.norm.weight"),
    ("class_labels_classifier.bias", "class_labels_classifier.bias", "class_embed.bias"),
    ("bbox_predictor.layers.2.weight", "bbox_predictor.layers.2.weight", "bbox_embed.layers.2.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "v4", "v5", "ours"),
    [(DEFORMABLE_DETR, *names) for names in DEFORMABLE_NAMES] + [(DETR, *names) for names in DETR_NAMES],
)
def test_names_old_and_new_become_ours_and_ours_become_the_old(family: str, v4: str, v5: str, ours: str):
    assert from_hugging_face(v4, family) == from_hugging_face(v5, family) == ours
    config = PRESETS["r50-two-stage" if family == DEFORMABLE_DETR else "detr-r50"]
    assert v4 in to_hugging_face({ours: torch.ones(1)}, config)


@pytest.mark.parametrize("prefix", ["model.backbone.conv_encoder.model.", "model.backbone.model."])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("embedder.embedder.convolution.weight", "conv1.weight"),
        ("embedder.embedder.normalization.running_mean", "bn1.running_mean"),
        ("encoder.stages.0.layers.2.layer.0.convolution.weight", "layer1.2.conv1.weight"),
        ("encoder.stages.3.layers.1.layer.2.normalization.bias", "layer4.1.bn3.bias"),
        ("encoder.stages.1.layers.0.shortcut.convolution.weight", "layer2.0.downsample.0.weight"),
        ("encoder.stages.1.layers.0.shortcut.normalization.weight", "layer2.0.downsample.1.weight"),
    ],
)
def test_the_trunk_of_transformers_own_resnet_becomes_ours(prefix: str, theirs: str, ours: str):
    for family in (DEFORMABLE_DETR, DETR):
        assert from_hugging_face(prefix + theirs, family) == f"backbone.{ours}"


def test_the_decoders_copies_of_the_heads_are_the_heads():
    for name in ("bbox_embed.3.layers.0.bias", "class_embed.3.bias"):
        assert from_hugging_face(f"model.decoder.{name}", DEFORMABLE_DETR) == name
        assert f"model.decoder.{name}" in to_hugging_face({name: torch.ones(1)}, PRESETS["r50-two-stage"])


def test_query_key_and_value_matrices_are_joined_in_that_order():
    prefix = "transformer.decoder.layers.2.self_attn."
    stored = {f"{prefix}{k}_proj.weight": torch.full((2, 2), float(i)) for i, k in ((2, "v"), (0, "q"), (1, "k"))}
    (name, tensor), *others = joined(stored).items()
    assert (name, others) == (f"{prefix}in_proj_weight", [])
    assert tensor[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_missing_third_is_not_papered_over():
    prefix = "transformer.decoder.layers.2.self_attn."
    out = joined({f"{prefix}{k}_proj.bias": torch.zeros(2) for k in "qk"})
    assert f"{prefix}in_proj_bias" not in out
    assert len(out) == 2


def test_a_joined_matrix_is_written_in_three():
    ours = {"transformer.decoder.layers.0.multihead_attn.in_proj_bias": torch.arange(6.0)}
    written = to_hugging_face(ours, PRESETS["detr-r50"])
    prefix = "model.decoder.layers.0.encoder_attn."
    assert {name: tensor.tolist() for name, tensor in written.items()} == {
        f"{prefix}q_proj.bias": [0, 1], f"{prefix}k_proj.bias": [2, 3], f"{prefix}v_proj.bias": [4, 5],
    }  # fmt: skip


def _state(preset: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_detector(PRESETS[preset]).state_dict()


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "fasterrcnn-r50-fpn" and "tiny" not in name])
def test_every_name_of_transformers_own_model_is_written(preset: str):
    transformers = pytest.importorskip(
        "transformers", reason="transformers, the oracle of this test, is not installed"
    )
    pytest.importorskip("timm", reason="timm, from which transformers takes the trunk, is not installed")
    config = PRESETS[preset]
    common = {"use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": "resnet50", "num_labels": 91}
    common["dilation"] = config.dilation
    with torch.device("meta"):
        if config.family == DETR:
            model = transformers.DetrForObjectDetection(transformers.DetrConfig(**common))
        else:
            model = transformers.DeformableDetrForObjectDetection(
                transformers.DeformableDetrConfig(
                    **common, num_feature_levels=config.levels, with_box_refine=config.refine_boxes,
                    two_stage=config.two_stage,
                )
            )  # fmt: skip
    written = to_hugging_face(_state(preset), config)
    # transformers holds its own names of version 5; ours must be those of 4, which it renames while reading.
    theirs = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    renames = ((".conv_encoder.", "."), (".fc1.", ".mlp.fc1."), (".fc2.", ".mlp.fc2."),
               ("self_attn.out_proj", "self_attn.o_proj"),
               ("encoder_attn.out_proj", "encoder_attn.o_proj"))  # fmt: skip
    names = set()
    for name in written:
        for old, new in renames:
            name = name.replace(old, new)
        names.add(name)
    assert names == theirs
