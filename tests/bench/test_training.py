"""A training step of ours beside one of transformers': the same weights, the same loss."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch

from ddetr_cli.bench import training
from ddetr_cli.bench.options import BenchOptions
from ddetr_cli.bench.peers import TRANSFORMERS, missing_packages
from ddetr_cli.bench.tables import Silence
from ddetr_cli.bench.timing import Samples
from ddetr_cli.bench.training import StepResult, TrainingSection, measure_training
from ddetr_cli.cli.timed import TrainSteps
from ddetr_cli.errors import UsageError
from ddetr_cli.presets import PRESETS

OPTIONS = BenchOptions(
    ("r50",), size_hw=(64, 96), batch_size=2, precisions=("fp32",), device="cpu", rounds=2, warmup=1
)
needs_transformers = pytest.mark.skipif(
    bool(missing_packages(TRANSFORMERS)), reason="transformers and timm are not installed"
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets of two layers each and without dropout, which is random."""
    for name in ("r50", "detr-r50"):
        shallow = dataclasses.replace(PRESETS[name], encoder_layers=1, decoder_layers=2, dropout=0.0)
        monkeypatch.setitem(PRESETS, name, shallow)


@needs_transformers
@pytest.mark.parametrize("preset", ["r50"])
def test_both_programs_learn_from_the_same_loss(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = training.build_pair

    def without_dropout(*arguments: Any) -> Any:
        theirs, ours = build(*arguments)
        theirs.config.dropout = theirs.config.attention_dropout = theirs.config.activation_dropout = 0.0
        for module in theirs.modules():
            for name in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        ours.model.train()
        for module in ours.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        return theirs, ours

    monkeypatch.setattr(training, "build_pair", without_dropout)
    (section,) = measure_training(dataclasses.replace(OPTIONS, models=(preset,)), TrainSteps(), Silence())
    ours, theirs, half = section.results
    assert (ours.program, theirs.program, half.program) == ("ddetr fp32", "transformers fp32", "transformers bf16")
    assert [result.is_ours for result in section.results] == [True, False, False]
    assert theirs.first_loss == pytest.approx(ours.first_loss, rel=1e-4)
    assert ours.first_loss > 1
    ratios = section.to_json()["programs"][1]["ratios"]["ddetr fp32"]["samples"]
    assert ratios == [a / b for a, b in zip(theirs.times.values, ours.times.values, strict=True)]


def test_our_step_changes_the_weights_it_was_given() -> None:
    from ddetr_cli.bench.subjects import open_model, random_pixels

    model = open_model("tiny", Silence()).model
    before = model.get_parameter("class_embed.0.weight").detach().clone()
    run = TrainSteps().step(model, "fp32", random_pixels((64, 96), 2), 7)
    first, second = run(), run()
    assert first > 0 and second != first
    assert not torch.equal(model.get_parameter("class_embed.0.weight"), before)


def test_without_transformers_ours_is_measured_alone_and_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else find(name))
    (section,) = measure_training(dataclasses.replace(OPTIONS, models=("tiny",)), TrainSteps(), Silence())
    assert [result.program for result in section.results] == ["ddetr fp32"]
    (table,) = section.tables()
    assert any("not measured: transformers (not installed: timm)" in note for note in table.notes)


def test_the_hours_of_the_whole_training_are_projected_beside_the_published_ones() -> None:
    result = StepResult("ddetr fp32", True, Samples((2.0, 4.0, 3.0)), 1.0)
    assert result.projected_hours(batch_size=2, epochs=50) == pytest.approx(118_287 * 50 * 1.5 / 3600)
    section = TrainingSection("detr-r50", 2, (result,), {}, {})
    (table,) = section.tables()
    assert table.rows[0][-1] == f"{118_287 * 500 * 1.5 / 3600:,.0f}"
    assert (
        "projected: hours here for 118,287 pictures x 500 epochs at this rate; published: 2000 hours of a V100"
        in (table.notes)
    )
    assert TrainingSection("tiny", 2, (result,), {}, {}).epochs == 50


def test_what_is_not_trained_here_is_refused() -> None:
    with pytest.raises(UsageError, match="fasterrcnn-r50-fpn is not trained here"):
        measure_training(dataclasses.replace(OPTIONS, models=("fasterrcnn-r50-fpn",)), TrainSteps(), Silence())
    with pytest.raises(UsageError, match="Leave fp16 out"):
        measure_training(dataclasses.replace(OPTIONS, precisions=("fp16",)), TrainSteps(), Silence())
