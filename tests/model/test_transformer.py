from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ddetr_cli.model import transformer
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import BoxHead
from ddetr_cli.model.transformer import (
    DeformableTransformer,
    TransformerOutput,
    _valid_ratio,
    anchor_logits,
    encoder_reference,
    inverse_sigmoid,
    refine_boxes,
)
from ddetr_cli.ops import msda
from ddetr_cli.presets import ModelConfig

FORMS = {
    "plain": ModelConfig(
        "golden", levels=3, hidden_dim=32, heads=4, encoder_layers=2, decoder_layers=3, ffn_dim=48, dropout=0.0,
        queries=6, classes=5,
    ),
    "refine": ModelConfig(
        "golden", levels=3, hidden_dim=32, heads=4, encoder_layers=2, decoder_layers=3, ffn_dim=48, dropout=0.0,
        queries=6, classes=5, refine_boxes=True,
    ),
    "two_stage": ModelConfig(
        "golden", levels=3, hidden_dim=256, heads=4, encoder_layers=1, decoder_layers=2, ffn_dim=48, dropout=0.0,
        queries=6, classes=5, refine_boxes=True, two_stage=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(FORMS))
def run(request: pytest.FixtureRequest, golden):
    """One form of the transformer with the authors' weights: their numbers, our output and gradients."""
    config = FORMS[request.param]
    numbers = golden(f"transformer_{request.param}")
    weights = {name.removeprefix("weight/"): t.double() for name, t in numbers.items() if name.startswith("weight/")}
    model = DeformableTransformer(config).double().eval()
    heads = {
        "class_embed": nn.ModuleList([nn.Linear(config.hidden_dim, config.classes) for _ in range(3)]),
        "bbox_embed": nn.ModuleList([BoxHead(config.hidden_dim) for _ in range(3)]),
    }
    for kind, modules in heads.items():
        modules.double()
        state = {name.removeprefix(f"decoder.{kind}."): t for name, t in weights.items() if f".{kind}." in name}
        if state:
            modules.load_state_dict(state)
    # strict: every tensor of the authors' transformer has a place of the same name in ours, and the reverse
    model.load_state_dict({name: t for name, t in weights.items() if "_embed." not in name})

    maps = [numbers[f"src{level}"].clone().requires_grad_() for level in range(3)]
    paddings = [numbers[f"mask{level}"] for level in range(3)]
    positions = [numbers[f"pos{level}"] for level in range(3)]
    queries, class_heads, box_heads = (
        numbers.get("query_embed"),
        list(heads["class_embed"]),
        list(heads["bbox_embed"]),
    )

    def forward() -> TransformerOutput:
        return model(maps, paddings, positions, queries, class_heads, box_heads)

    out = forward()
    if config.two_stage:
        # The authors take the anchors' logarithm in float32, and the last bit of a float32 logarithm depends on the
        # processor that took it. Their bits are put in place of ours (one unit at most), for the rest to be exact.
        ours, is_usable = anchor_logits([8, 10, 4, 5, 2, 3], paddings, torch.float32)
        is_read = numbers["enc_coord_unact"] < 1e29
        theirs = numbers["enc_coord_unact"] - (out.proposals.boxes_unactivated.detach() - ours)
        theirs = torch.where(is_read, theirs.float(), ours)
        torch.testing.assert_close(theirs, ours, rtol=2.0**-22, atol=1e-12, equal_nan=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "anchor_logits", lambda *_: (theirs, is_usable))
            out = forward()
    hidden = torch.stack(out.hidden)
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).reshape(hidden.shape)).sum().backward()
    return numbers, out, maps, model


def _close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_decoder_output_equals_the_authors(run):
    numbers, out, _, _ = run
    _close(torch.stack(out.hidden), numbers["hs"])


def test_references_equal_the_authors(run):
    numbers, out, _, _ = run
    _close(out.references[0], numbers["init_reference"])
    _close(torch.stack(out.boxes or out.references), numbers["inter_references"])


def test_gradients_of_the_feature_maps_equal_the_authors(run):
    numbers, _, maps, _ = run
    for level, tensor in enumerate(maps):
        assert tensor.grad is not None
        _close(tensor.grad, numbers[f"grad_src{level}"])


def test_gradient_norms_of_every_weight_equal_the_authors(run):
    numbers, _, _, model = run
    norms = {name.removeprefix("gradnorm/"): t for name, t in numbers.items() if name.startswith("gradnorm/")}
    checked = 0
    for name, parameter in model.named_parameters():
        if name in norms:
            ours = parameter.grad.norm() if parameter.grad is not None else torch.zeros((), dtype=torch.float64)
            _close(ours, norms[name])
            checked += 1
    assert checked == len([name for name in norms if "_embed." not in name]) > 40


def test_proposals_equal_the_authors(run):
    numbers, out, _, _ = run
    if "enc_class" not in numbers:
        assert out.proposals is None
        return
    _close(out.proposals.logits, numbers["enc_class"])
    _close(out.proposals.boxes_unactivated.clamp(max=1e30), numbers["enc_coord_unact"])


def test_the_op_and_its_gradients_equal_the_authors(golden):
    numbers = golden("op")
    value, xy, weights = (numbers[n].clone().requires_grad_() for n in ("value", "sampling_xy", "weights"))
    output = msda(value, numbers["level_hw"].flatten().tolist(), xy, weights)
    _close(output, numbers["output"])
    output.backward(numbers["grad_output"])
    _close(value.grad, numbers["grad_value"])
    _close(xy.grad, numbers["grad_sampling_xy"])
    _close(weights.grad, numbers["grad_weights"])


def test_valid_ratio_is_width_then_height_of_the_unpadded_part():
    is_padding = torch.ones(2, 8, 10, dtype=torch.bool)
    is_padding[0, :6, :5] = False
    is_padding[1] = False
    assert _valid_ratio(is_padding, torch.float64).tolist() == [[0.5, 0.75], [1.0, 1.0]]


def test_a_position_looks_at_its_own_centre_on_its_own_level():
    # On its own level the ratios cancel, whatever they are: the centre of pixel (row 1, column 2) of 4x6.
    ratios = torch.tensor([[[0.7, 0.9], [0.5, 1.0]]], dtype=torch.float64)
    reference = encoder_reference([4, 6, 2, 3], ratios)
    assert reference.shape == (1, 24 + 6, 2, 2)
    torch.testing.assert_close(reference[0, 6 + 2, 0], torch.tensor([2.5 / 6, 1.5 / 4], dtype=torch.float64))
    # Seen from level 0, the same point lies at that fraction of level 1's valid part.
    expected = torch.tensor([2.5 / 6 / 0.7 * 0.5, 1.5 / 4 / 0.9 * 1.0], dtype=torch.float64)
    torch.testing.assert_close(reference[0, 6 + 2, 1], expected)


def test_inverse_sigmoid_is_clamped_at_both_ends():
    x = inverse_sigmoid(torch.tensor([0.0, 1e-7, 0.5, 1.0, 2.0, -1.0], dtype=torch.float64))
    limit = math.log(1 / 1e-5)
    expected = torch.tensor([-limit, -limit, 0.0, limit, limit, -limit], dtype=torch.float64)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-12)


def test_refinement_of_a_point_moves_its_centre_and_sets_its_size():
    box = refine_boxes(torch.tensor([0.0, 0.0, -2.0, 1.0]), torch.tensor([0.25, 0.5]))
    expected = torch.tensor([0.25, 0.5, 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1))])
    torch.testing.assert_close(box, expected)


def test_anchors_double_their_side_with_each_level_and_skip_the_border():
    paddings = [torch.zeros(1, 100, 2, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.bool)]
    anchors, is_usable = anchor_logits([100, 2, 2, 2], paddings, torch.float64)
    sides = anchors.sigmoid()[0, :, 2:]
    torch.testing.assert_close(sides[0], torch.tensor([0.05, 0.05], dtype=torch.float64))
    torch.testing.assert_close(sides[-1], torch.tensor([0.1, 0.1], dtype=torch.float64))
    # Rows 0 and 99 of 100 have their centre at 0.005 and 0.995: outside (0.01, 0.99).
    assert not is_usable[0, 0] and not is_usable[0, 199]
    assert is_usable[0, 2] and is_usable[0, 197] and is_usable[0, 200]


def test_references_pass_no_gradient_to_the_layers_before():
    # Each layer's boxes are trained by its own loss alone (look forward once): arXiv:2010.04159, section 4.2.
    config = FORMS["refine"]
    torch.manual_seed(0)
    model = DeformableTransformer(config).eval()
    heads = [BoxHead(config.hidden_dim) for _ in range(config.decoder_layers)]
    for head in heads:
        nn.init.normal_(head.get_parameter("layers.2.weight"))
    maps = [torch.randn(1, 32, s, s) for s in (4, 2, 1)]
    paddings = [torch.zeros(1, s, s, dtype=torch.bool) for s in (4, 2, 1)]
    out = model(maps, paddings, maps, torch.randn(6, 64), [], heads)
    out.boxes[1].sum().backward()
    assert heads[1].get_parameter("layers.2.weight").grad.abs().sum() > 0
    assert heads[0].get_parameter("layers.2.weight").grad is None


def test_a_two_stage_model_with_fewer_positions_than_queries_answers_with_all_positions():
    config = ModelConfig(
        "small", backbone="resnet-tiny", hidden_dim=64, encoder_layers=1, decoder_layers=2, ffn_dim=64, queries=300,
        refine_boxes=True, two_stage=True, classes=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_detector(config).eval()
    with torch.inference_mode():
        out = model(torch.randn(1, 3, 40, 48), torch.zeros(1, 40, 48, dtype=torch.bool))
    positions = 5 * 6 + 3 * 3 + 2 * 2 + 1 * 1
    assert out.logits.shape == (1, positions, 3)
    assert bool(torch.isfinite(out.boxes_cxcywh).all())
