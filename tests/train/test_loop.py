from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ddetr_cli.model.backbone import BACKBONES, FrozenBatchNorm2d
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DetectionModel, DetectorOutput
from ddetr_cli.presets import DEFORMABLE_DETR, get_preset
from ddetr_cli.train.criterion import Criterion
from ddetr_cli.train.dataset import Batch
from ddetr_cli.train.loop import Trainer
from ddetr_cli.train.matcher import Target
from ddetr_cli.train.recipe import Recipe, parameter_groups


class Explosive(nn.Module):
    """A detector of one query whose gradient is infinite for pictures of zeros, and whose loss is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, pixels: Tensor, is_padding: Tensor | None) -> DetectorOutput:
        x = (self.weight * pixels.mean()).sqrt()  # d sqrt(0) is infinite
        return DetectorOutput(x.expand(1, 1, 2), torch.full((1, 1, 4), 0.5))


def _batch(value: float) -> Batch:
    target = Target(torch.empty(0, dtype=torch.long), torch.empty(0, 4))
    return Batch(torch.full((1, 3, 4, 4), value), None, [target])


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted() -> None:
    model = Explosive()
    recipe = Recipe(epochs=9, batch_size=1, learning_rate=0.1, backbone_rate=0.1, ema_decay=0.5)
    groups = [{"params": list(model.parameters()), "lr": 0.1}]
    trainer = Trainer(model, Criterion(DEFORMABLE_DETR), recipe, groups, torch.device("cpu"))
    result = trainer.step([_batch(0.0)])
    assert math.isnan(result.loss) and result.terms == {}
    assert (trainer.steps_done, trainer.bad_in_a_row) == (1, 1)
    assert model.weight.item() == 1.0
    assert trainer.average is not None and trainer.average.steps == 0

    result = trainer.step([_batch(1.0)])
    assert (trainer.steps_done, trainer.bad_in_a_row) == (2, 0) and result.loss > 0
    # AdamW's first step is the rate itself, downwards: fewer objects; and decay of 1e-4 * 0.1.
    assert model.weight.item() == pytest.approx(0.9, abs=1e-4)


class Normed(Explosive):
    """The same after a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, pixels: Tensor, is_padding: Tensor | None) -> DetectorOutput:
        return super().forward(self.norm(pixels) * 0 if is_padding is None else self.norm(pixels) + 9, None)


def test_a_step_that_is_skipped_or_fails_leaves_the_statistics_of_batch_norm_alone() -> None:
    model = Normed()
    recipe = Recipe(epochs=9, batch_size=1, learning_rate=0.1, backbone_rate=0.1)
    groups = [{"params": list(model.parameters()), "lr": 0.1}]
    trainer = Trainer(model, Criterion(DEFORMABLE_DETR), recipe, groups, torch.device("cpu"))
    trainer.train_mode()
    bad = _batch(5.0)
    assert math.isnan(trainer.step([bad]).loss)
    wrong = replace(_batch(5.0), is_padding=torch.zeros(1), targets=[])  # the criterion wants as many as images
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        trainer.step([replace(_batch(5.0), is_padding=torch.zeros(1)), wrong])
    assert model.norm.running_mean is not None and model.norm.running_mean.tolist() == [0.0] * 3
    assert trainer.is_between_steps
    good = replace(_batch(5.0), is_padding=torch.zeros(1))
    assert math.isfinite(trainer.step([good]).loss)
    assert model.norm.running_mean.tolist() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("preset", ["r50", "r50-two-stage", "detr-r50"])
def test_passes_over_parts_of_a_batch_give_the_gradient_of_the_whole(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _frozen_trunk(preset, monkeypatch)
    recipe = Recipe(epochs=9, batch_size=4, learning_rate=0.0, backbone_rate=0.0, clip_norm=1e9)
    pixels = torch.randn(4, 3, 64, 64)
    # DETR's class loss is a mean over the pass: parts of equally many objects have equal weights.
    counts = (2, 1, 1, 2) if preset == "detr-r50" else (3, 0, 1, 2)
    targets = [Target(torch.arange(n) % 2, torch.rand(n, 4) * 0.3 + 0.2) for n in counts]
    whole = Batch(pixels, None, targets)
    parts = [Batch(pixels[i : i + 2], None, targets[i : i + 2]) for i in (0, 2)]
    gradients = []
    for batches in ([whole], parts):
        trainer = Trainer(
            model, Criterion(model.config.family), recipe, parameter_groups(model, recipe), torch.device("cpu")
        )
        result = trainer.step(batches)
        gradients.append((result, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (one, of_whole), (two, of_parts) = gradients
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert two.terms == pytest.approx(one.terms, rel=1e-5)
    assert of_whole.keys() == of_parts.keys()
    for name, gradient in of_whole.items():
        assert torch.allclose(
            of_parts[name], gradient, rtol=1e-3, atol=1e-5 * max(1.0, float(gradient.abs().max()))
        ), name


@pytest.mark.parametrize("preset", ["r50", "r50-refine", "r50-two-stage", "r50-single-scale", "detr-r50"])
def test_every_trained_parameter_has_a_gradient_even_where_nothing_is_to_be_found(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processes that share a training wait for the gradient of every parameter from each other.
    model = _frozen_trunk(preset, monkeypatch)
    recipe = Recipe(epochs=9, batch_size=2, learning_rate=0.0, backbone_rate=0.0)
    trainer = Trainer(
        model, Criterion(model.config.family), recipe, parameter_groups(model, recipe), torch.device("cpu")
    )
    nothing = Target(torch.empty(0, dtype=torch.long), torch.empty(0, 4))
    assert math.isfinite(trainer.step([Batch(torch.randn(2, 3, 64, 64), None, [nothing, nothing])]).loss)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def _frozen_trunk(preset: str, monkeypatch: pytest.MonkeyPatch) -> DetectionModel:
    """A small model of the form of ``preset``; what it says of a picture does not depend on the others."""
    tiny = BACKBONES["resnet-tiny"]
    spec = replace(tiny, widths=(16, 16, 16, 16), depths=(1, 1, 1, 1), stem_channels=16, norm=FrozenBatchNorm2d)
    monkeypatch.setitem(BACKBONES, "resnet-tiny", spec)
    torch.manual_seed(0)
    return build_detector(
        get_preset(
            preset, backbone="resnet-tiny", hidden_dim=64, heads=2, encoder_layers=1, decoder_layers=2, ffn_dim=32,
            dropout=0.0, queries=7, classes=2,
        )
    )  # fmt: skip
