from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddetr_cli.model.detr import Detr
from ddetr_cli.presets import DETR, PRESETS, ModelConfig

SMALL = ModelConfig(
    "small", family=DETR, backbone="resnet-tiny", hidden_dim=32, heads=4, levels=1, encoder_layers=1,
    decoder_layers=3, ffn_dim=64, queries=10, classes=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Detr:
    torch.manual_seed(0)
    return Detr(SMALL)


@pytest.mark.parametrize("preset", ["detr-r50", "detr-r50-dc5"])
def test_parameter_totals_equal_the_published_models(preset: str):
    with torch.device("meta"):
        detr = Detr(PRESETS[preset])
    sizes = [(p.numel(), p.requires_grad) for p in detr.parameters()]
    assert sum(size for size, is_trained in sizes if is_trained) == 41_302_368
    assert sum(size for size, _ in sizes) == 41_524_768


def test_there_is_one_logit_more_than_classes_and_one_pair_per_earlier_layer_in_training(model: Detr):
    pixels = torch.randn(2, 3, 64, 96)
    out = model.train()(pixels)
    assert len(out.aux) == 2
    for logits, boxes in ((out.logits, out.boxes_cxcywh), *out.aux):
        assert logits.shape == (2, 10, 6)
        assert boxes.shape == (2, 10, 4)
        assert bool(((boxes > 0) & (boxes < 1)).all())
    with torch.inference_mode():
        assert model.eval()(pixels).aux == []
    assert out.proposals is None


def test_matrices_of_the_transformer_start_xavier_and_the_rest_as_pytorch_does(model: Detr):
    for name, parameter in model.transformer.named_parameters():
        if parameter.dim() == 2:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.8 * bound < parameter.abs().max() <= bound, name
        if name.endswith(("in_proj_bias", "out_proj.bias")):
            assert parameter.abs().max() == 0, name
    # nn.Linear's own: uniform within one over the root of its inputs, biases too.
    for head in (model.class_embed, *model.bbox_embed.layers):
        bound = 1 / math.sqrt(32)
        assert 0 < head.get_parameter("bias").abs().max() <= bound
        assert 0.8 * bound < head.get_parameter("weight").abs().max() <= bound


def test_what_is_padding_is_not_read(model: Detr):
    model.eval()
    feature = torch.randn(1, 8, 32)
    position = torch.randn(1, 8, 32)
    is_padding = torch.tensor([[False] * 5 + [True] * 3])
    changed = feature.masked_fill(is_padding[..., None], 9.0)
    with torch.inference_mode():
        first, second = (
            model.transformer(x, position, torch.ones(4, 32), is_padding)[-1] for x in (feature, changed)
        )
        read = model.transformer(changed, position, torch.ones(4, 32), None)[-1]
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert not torch.allclose(first, read, atol=1e-3)


def test_no_padding_given_means_nothing_is_padded(model: Detr):
    pixels = torch.randn(2, 3, 64, 72)
    with torch.inference_mode():
        without, given = model.eval()(pixels), model(pixels, torch.zeros(2, 64, 72, dtype=torch.bool))
    torch.testing.assert_close(without.logits, given.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(without.boxes_cxcywh, given.boxes_cxcywh, rtol=0, atol=1e-6)


def test_every_layers_answer_goes_through_the_same_norm_and_heads(model: Detr):
    """With a norm that forgets its input, all layers must answer alike."""
    forgetful = Detr(SMALL).train()
    for module in forgetful.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    nn.init.zeros_(forgetful.transformer.decoder.norm.weight)
    out = forgetful(torch.randn(1, 3, 64, 64))
    for logits, boxes in out.aux:
        assert torch.equal(logits, out.logits)
        assert torch.equal(boxes, out.boxes_cxcywh)


def test_a_dilated_model_sees_four_times_the_positions():
    pixels = torch.zeros(1, 3, 64, 96, device="meta")
    seen = []
    for dilation in (False, True):
        with torch.device("meta"):
            detr = Detr(replace(SMALL, dilation=dilation))
            detr.transformer.encoder.layers[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
            detr(pixels)
    assert seen == [6, 24]


def test_queries_of_the_decoder_start_at_zero_and_are_told_apart_by_position_only(model: Detr):
    starts = []
    layer = model.transformer.decoder.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, x: starts.append(x[:2]))
    try:
        with torch.inference_mode():
            model.eval()(torch.randn(2, 3, 64, 64))
    finally:
        hook.remove()
    ((content, position),) = starts
    assert content.abs().max() == 0
    assert torch.equal(position, model.query_embed.weight.expand(2, -1, -1))
