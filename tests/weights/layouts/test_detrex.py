from __future__ import annotations

import pytest

from ddetr_cli.weights.layouts.detrex import renamer

THREE_MAPS = [f"neck.convs.{i}.conv.weight" for i in range(3)]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.stem.conv1.weight", "backbone.conv1.weight"),
        ("backbone.stem.conv1.norm.running_var", "backbone.bn1.running_var"),
        ("backbone.res2.0.shortcut.weight", "backbone.layer1.0.downsample.0.weight"),
        ("backbone.res2.0.shortcut.norm.bias", "backbone.layer1.0.downsample.1.bias"),
        ("backbone.res5.2.conv3.weight", "backbone.layer4.2.conv3.weight"),
        ("backbone.res5.2.conv3.norm.weight", "backbone.layer4.2.bn3.weight"),
        ("neck.convs.2.conv.bias", "input_proj.2.0.bias"),
        ("neck.convs.2.norm.weight", "input_proj.2.1.weight"),
        ("neck.extra_convs.0.conv.weight", "input_proj.3.0.weight"),
        ("query_embedding.weight", "query_embed.weight"),
        ("transformer.level_embeds", "transformer.level_embed"),
        ("transformer.reference_points.weight", "transformer.reference_points.weight"),
        ("transformer.enc_output_norm.bias", "transformer.enc_output_norm.bias"),
        ("transformer.encoder.layers.3.attentions.0.sampling_offsets.bias",
         "transformer.encoder.layers.3.self_attn.sampling_offsets.bias"),
        ("transformer.encoder.layers.3.norms.1.bias", "transformer.encoder.layers.3.norm2.bias"),
        ("transformer.encoder.layers.3.ffns.0.layers.0.0.bias", "transformer.encoder.layers.3.linear1.bias"),
        ("transformer.decoder.layers.3.ffns.0.layers.1.weight", "transformer.decoder.layers.3.linear2.weight"),
        ("transformer.decoder.layers.3.attentions.0.attn.in_proj_weight",
         "transformer.decoder.layers.3.self_attn.in_proj_weight"),
        ("transformer.decoder.layers.3.attentions.1.value_proj.weight",
         "transformer.decoder.layers.3.cross_attn.value_proj.weight"),
        ("transformer.decoder.layers.3.norms.0.weight", "transformer.decoder.layers.3.norm2.weight"),
        ("transformer.decoder.layers.3.norms.1.weight", "transformer.decoder.layers.3.norm1.weight"),
        ("transformer.decoder.layers.3.norms.2.weight", "transformer.decoder.layers.3.norm3.weight"),
        ("transformer.decoder.bbox_embed.0.layers.2.weight", "bbox_embed.0.layers.2.weight"),
        ("class_embed.6.weight", "class_embed.6.weight"),
    ],
)  # fmt: skip
def test_detrexs_names_become_ours(theirs: str, ours: str):
    assert renamer(THREE_MAPS)(theirs) == ours
