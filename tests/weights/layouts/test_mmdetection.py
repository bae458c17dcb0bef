from __future__ import annotations

import pytest
import torch

from ddetr_cli.weights.layouts.mmdetection import renamer, with_biases

THREE_MAPS = [f"neck.convs.{i}.conv.weight" for i in range(3)]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.layer1.0.downsample.1.running_mean", "backbone.layer1.0.downsample.1.running_mean"),
        ("neck.convs.1.conv.weight", "input_proj.1.0.weight"),
        ("neck.convs.1.gn.bias", "input_proj.1.1.bias"),
        ("neck.extra_convs.0.gn.weight", "input_proj.3.1.weight"),
        ("query_embedding.weight", "query_embed.weight"),
        ("level_embed", "transformer.level_embed"),
        ("reference_points_fc.bias", "transformer.reference_points.bias"),
        ("memory_trans_fc.weight", "transformer.enc_output.weight"),
        ("memory_trans_norm.weight", "transformer.enc_output_norm.weight"),
        ("pos_trans_fc.bias", "transformer.pos_trans.bias"),
        ("pos_trans_norm.bias", "transformer.pos_trans_norm.bias"),
        ("encoder.layers.5.self_attn.attention_weights.bias",
         "transformer.encoder.layers.5.self_attn.attention_weights.bias"),
        ("encoder.layers.5.ffn.layers.0.0.weight", "transformer.encoder.layers.5.linear1.weight"),
        ("encoder.layers.5.ffn.layers.1.bias", "transformer.encoder.layers.5.linear2.bias"),
        ("encoder.layers.5.norms.0.bias", "transformer.encoder.layers.5.norm1.bias"),
        ("decoder.layers.5.self_attn.attn.out_proj.weight", "transformer.decoder.layers.5.self_attn.out_proj.weight"),
        ("decoder.layers.5.cross_attn.output_proj.bias", "transformer.decoder.layers.5.cross_attn.output_proj.bias"),
        ("decoder.layers.5.norms.0.bias", "transformer.decoder.layers.5.norm2.bias"),
        ("decoder.layers.5.norms.1.bias", "transformer.decoder.layers.5.norm1.bias"),
        ("decoder.layers.5.norms.2.bias", "transformer.decoder.layers.5.norm3.bias"),
        ("bbox_head.cls_branches.6.weight", "class_embed.6.weight"),
        ("bbox_head.reg_branches.2.0.weight", "bbox_embed.2.layers.0.weight"),
        ("bbox_head.reg_branches.2.2.weight", "bbox_embed.2.layers.1.weight"),
        ("bbox_head.reg_branches.2.4.bias", "bbox_embed.2.layers.2.bias"),
    ],
)  # fmt: skip
def test_mmdetections_names_become_ours(theirs: str, ours: str):
    assert renamer(THREE_MAPS)(theirs) == ours


def test_projections_without_bias_get_zeros_and_those_with_one_keep_it():
    weight = torch.ones(3, 2, 1, 1, dtype=torch.float16)
    out = with_biases({"input_proj.0.0.weight": weight, "input_proj.1.0.weight": weight,
                       "input_proj.1.0.bias": torch.ones(3), "input_proj.1.1.weight": torch.ones(3)})  # fmt: skip
    assert torch.equal(out["input_proj.0.0.bias"], torch.zeros(3, dtype=torch.float16))
    assert torch.equal(out["input_proj.1.0.bias"], torch.ones(3))
    assert "input_proj.1.1.bias" not in out
