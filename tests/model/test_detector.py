from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddetr_cli.model.attention import DeformableAttention
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DeformableDetr, DetectionModel
from ddetr_cli.presets import PRESETS, ModelConfig

# Trainable and all parameters, from the published figures and the authors' code.
PARAMETERS = {
    "r50": (39_847_265, 40_069_665),
    "r50-refine": (40_627_260, 40_849_660),
    "r50-two-stage": (40_959_129, 41_181_529),
    "r50-single-scale": (33_844_193, 34_066_593),
    "r50-single-scale-dc5": (33_844_193, 34_066_593),
}
SMALL = ModelConfig(
    "small", backbone="resnet-tiny", hidden_dim=64, encoder_layers=1, decoder_layers=3, ffn_dim=64, queries=10,
    classes=5,
)  # fmt: skip


def _meta(config: ModelConfig) -> DetectionModel:
    with torch.device("meta"):
        return build_detector(config)


@pytest.fixture(scope="module")
def plain() -> DeformableDetr:
    torch.manual_seed(0)
    return build_detector(SMALL)


@pytest.mark.parametrize("preset", list(PARAMETERS))
def test_parameter_totals_equal_the_published_models(preset: str):
    model = _meta(PRESETS[preset])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (trainable, sum(p.numel() for p in model.parameters())) == PARAMETERS[preset]


def test_four_classes_give_the_number_the_authors_code_prints():
    # fundamentalvision/Deformable-DETR issue 110: "number of params: 39824906"
    model = _meta(replace(PRESETS["r50"], classes=4))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 39_824_906


def test_tiny_stays_under_seven_million_parameters():
    assert sum(p.numel() for p in _meta(PRESETS["tiny"]).parameters()) < 7_000_000


def test_the_small_systems_to_compare_are_of_equal_size():
    ours, detr = (sum(p.numel() for p in _meta(PRESETS[name]).parameters()) for name in ("tiny-plain", "detr-tiny"))
    assert abs(ours - detr) < 0.01 * ours
    trunks = [PRESETS[name].backbone for name in ("tiny", "tiny-plain", "detr-tiny")]
    assert trunks == ["resnet-tiny"] * 3


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_builds_a_detector_that_knows_its_configuration(preset: str):
    model = _meta(PRESETS[preset])
    assert isinstance(model, DetectionModel)
    assert model.config == PRESETS[preset]
    assert model.training


def test_class_heads_start_at_one_percent(plain: DeformableDetr):
    bias = plain.get_parameter("class_embed.0.bias")
    torch.testing.assert_close(bias, torch.full((5,), -math.log(99)))


def test_boxes_start_small_at_their_references(plain: DeformableDetr):
    assert plain.get_parameter("bbox_embed.0.layers.2.weight").abs().max() == 0
    assert plain.get_parameter("bbox_embed.0.layers.2.bias").tolist() == [0.0, 0.0, -2.0, -2.0]


@pytest.mark.parametrize("two_stage", [False, True])
def test_refining_heads_start_as_copies_and_only_the_first_starts_small(two_stage: bool):
    model = build_detector(replace(SMALL, refine_boxes=True, two_stage=two_stage))
    count = 4 if two_stage else 3
    assert len(model.class_embed) == len(model.bbox_embed) == count
    for head in range(count):
        size = -2.0 if head == 0 and not two_stage else 0.0
        assert model.get_parameter(f"bbox_embed.{head}.layers.2.bias").tolist() == [0.0, 0.0, size, size]
        for name in ("class_embed.{}.weight", "bbox_embed.{}.layers.0.weight", "bbox_embed.{}.layers.1.bias"):
            first, own = model.get_parameter(name.format(0)), model.get_parameter(name.format(head))
            assert torch.equal(first, own)
            assert head == 0 or first is not own


def test_sampling_starts_in_eight_directions_with_growing_distance(plain: DeformableDetr):
    attention = next(m for m in plain.modules() if isinstance(m, DeformableAttention))
    assert attention.sampling_offsets.weight.abs().max() == 0
    assert attention.attention_weights.weight.abs().max() == 0
    assert attention.attention_weights.bias.abs().max() == 0
    offsets = attention.sampling_offsets.bias.view(8, 4, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (x, y) in enumerate(directions):
        for level in range(4):
            for point in range(4):
                expected = torch.tensor([x * (point + 1.0), y * (point + 1.0)])
                torch.testing.assert_close(offsets[head, level, point], expected, rtol=1e-6, atol=1e-6)


def test_matrices_of_the_transformer_start_xavier_and_projections_without_bias(plain: DeformableDetr):
    for name, parameter in plain.transformer.named_parameters():
        if parameter.dim() == 2 and not name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            if name == "level_embed":
                continue
            bound = math.sqrt(6 / sum(parameter.shape))
            assert parameter.abs().max() <= bound, name
            # A uniform distribution fills its range and has a third of its square as variance.
            assert parameter.abs().max() > 0.8 * bound, name
            assert math.isclose(float(parameter.detach().var()), bound**2 / 3, rel_tol=0.35), name
        if name.endswith(("value_proj.bias", "output_proj.bias", "in_proj_bias", "out_proj.bias")) or (
            name == "reference_points.bias"
        ):
            assert parameter.abs().max() == 0, name
    for projection in plain.input_proj:
        conv = projection.get_submodule("0")
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        assert conv.bias.abs().max() == 0
        fan = conv.weight[0].numel() + conv.weight[:, 0].numel()
        assert 0.8 * math.sqrt(6 / fan) < conv.weight.abs().max() <= math.sqrt(6 / fan)


def test_embeddings_start_normal():
    torch.manual_seed(0)
    model = build_detector(replace(SMALL, queries=300))
    assert math.isclose(float(model.query_embed.weight.detach().std()), 1.0, rel_tol=0.05)
    assert math.isclose(float(model.transformer.level_embed.detach().std()), 1.0, rel_tol=0.2)


def test_earlier_layers_are_predicted_in_training_only(plain: DeformableDetr):
    pixels, padding = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    out = plain.train()(pixels, padding)
    assert len(out.aux) == SMALL.decoder_layers - 1
    assert all(logits.shape == (1, 10, 5) and boxes.shape == (1, 10, 4) for logits, boxes in out.aux)
    with torch.inference_mode():
        assert plain.eval()(pixels, padding).aux == []


def test_padding_does_not_change_what_is_seen_in_its_shade(plain: DeformableDetr):
    """What stands in the padded area must not reach the predictions through attention."""
    plain.eval()
    pixels = torch.randn(1, 3, 128, 128)
    padding = torch.ones(1, 128, 128, dtype=torch.bool)
    padding[:, :128, :64] = False
    pixels[:, :, :, 64:] = 0
    with torch.inference_mode():
        maps = plain._feature_maps(pixels)
        first = plain(pixels, padding)
        # Change the projected maps under the padding only: every value there is masked.
        changed = [m.clone() for m in maps]
        for m in changed:
            m[..., (m.shape[-1] + 1) // 2 :] += 5.0
        plain._feature_maps = lambda _: changed  # type: ignore[method-assign]
        try:
            second = plain(pixels, padding)
        finally:
            del plain._feature_maps
    # Padded queries of the encoder differ, but nobody reads them.
    torch.testing.assert_close(first.logits, second.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(first.boxes_cxcywh, second.boxes_cxcywh, rtol=0, atol=1e-6)


@pytest.mark.parametrize("two_stage", [False, True])
def test_no_padding_given_means_nothing_is_padded(two_stage: bool):
    model = build_detector(replace(SMALL, refine_boxes=two_stage, two_stage=two_stage)).eval()
    pixels = torch.randn(2, 3, 64, 72)
    with torch.inference_mode():
        without, given = model(pixels), model(pixels, torch.zeros(2, 64, 72, dtype=torch.bool))
    torch.testing.assert_close(without.logits, given.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(without.boxes_cxcywh, given.boxes_cxcywh, rtol=0, atol=1e-6)


def test_proposals_come_with_two_stage_models_only(plain: DeformableDetr):
    pixels, padding = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    two_stage = build_detector(replace(SMALL, refine_boxes=True, two_stage=True)).eval()
    with torch.inference_mode():
        assert plain.eval()(pixels, padding).proposals is None
        logits, boxes = two_stage(pixels, padding).proposals
    positions = 8 * 8 + 4 * 4 + 2 * 2 + 1
    assert logits.shape == (1, positions, 5)
    assert boxes.shape == (1, positions, 4)
    assert bool(((boxes >= 0) & (boxes <= 1)).all())
