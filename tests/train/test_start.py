from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr_cli.classes import ClassTable
from ddetr_cli.errors import CheckpointError, UsageError
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import get_preset
from ddetr_cli.train import start
from ddetr_cli.train.options import TrainOptions
from ddetr_cli.train.start import starting_model, starting_recipe
from ddetr_cli.weights import LoadedModel, load_model, save_checkpoint

COLOURS = ClassTable((3, 11), ("red", "blue"))
FRUIT = ClassTable((3, 11), ("cherry", "plum"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of two colours with 9 queries at image size 48."""
    path = tmp_path_factory.mktemp("first") / "colours.safetensors"
    torch.manual_seed(0)
    save_checkpoint(path, build_detector(get_preset("tiny", classes=2, queries=9, image_size=48)), COLOURS)
    return path


def _state(path: Path) -> dict[str, torch.Tensor]:
    return load_model(str(path)).model.state_dict()


def test_starting_from_a_model_takes_its_shape_and_every_tensor(first: Path, watcher: type[Any]) -> None:
    progress = watcher()
    model = starting_model(TrainOptions(Path("run"), init=str(first)), COLOURS, progress)
    assert (model.config.queries, model.config.image_size) == (9, 48)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in _state(first).items())
    assert progress.warnings == [] and progress.notes == []


def test_other_classes_renew_the_class_heads_and_nothing_else(first: Path, watcher: type[Any]) -> None:
    progress = watcher()
    model = starting_model(TrainOptions(Path("run"), init=str(first), image_size=64), FRUIT, progress)
    assert model.config.image_size == 64
    state = model.state_dict()
    renewed = {name for name, tensor in _state(first).items() if not torch.equal(tensor, state[name])}
    # Biases start at one constant, so only the weights differ.
    assert renewed == {name for name in state if name.startswith("class_embed.") and name.endswith("weight")}
    assert progress.warnings == ["the data set has other classes than the checkpoint: the class heads start anew."]


def test_what_a_checkpoint_cannot_tell_reaches_the_user(
    first: Path, watcher: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(spec: str, *, preset: str | None, announce: Any) -> LoadedModel:
        announce("downloading")
        loaded = load_model(spec)
        return replace(loaded, report=replace(loaded.report, notes=("assumed not dilated",)))

    monkeypatch.setattr(start, "load_model", load)
    progress = watcher()
    starting_model(TrainOptions(Path("run"), init=str(first)), COLOURS, progress)
    assert (progress.notes, progress.warnings) == (["downloading"], ["assumed not dilated"])


def test_a_preset_that_is_not_in_the_file_is_refused(first: Path, watcher: type[Any]) -> None:
    with pytest.raises(CheckpointError, match="does not fit r50"):
        starting_model(TrainOptions(Path("run"), init=str(first), preset="r50"), COLOURS, watcher())


def test_downloads_are_announced(monkeypatch: pytest.MonkeyPatch, watcher: type[Any]) -> None:
    def load(config: Any, spec: str | None, *, announce: Any) -> dict[str, torch.Tensor]:
        announce("downloading the trunk")
        return {}

    monkeypatch.setattr(start, "load_backbone", load)
    monkeypatch.setattr(start, "build_detector", lambda config: torch.nn.Module())
    progress = watcher()
    starting_model(TrainOptions(Path("run")), COLOURS, progress)
    assert progress.notes == ["downloading the trunk"]


def test_a_trunk_of_ours_needs_no_weights_and_takes_none(tmp_path: Path, watcher: type[Any]) -> None:
    progress = watcher()
    options = TrainOptions(Path("run"), preset="tiny", backbone_weights="none")
    assert starting_model(options, COLOURS, progress).config.classes == 2
    assert progress.warnings == []
    options = TrainOptions(Path("run"), preset="tiny", backbone_weights="some.pth")
    with pytest.raises(UsageError, match="starts from random weights"):
        starting_model(options, COLOURS, watcher())


def test_a_resumed_run_takes_its_shape_from_its_configuration_alone(tmp_path: Path, watcher: type[Any]) -> None:
    config = get_preset("tiny", classes=2, queries=7)
    (tmp_path / "config.json").write_text(json.dumps({"model": config.to_dict(), "classes": COLOURS.to_json()}))
    # The file it once started from is gone.
    options = TrainOptions(tmp_path, init=str(tmp_path / "gone.safetensors"), resume=True)
    assert starting_model(options, COLOURS, watcher()).config == config


def test_faster_rcnn_is_refused_before_it_is_built(watcher: type[Any]) -> None:
    with pytest.raises(UsageError, match="cannot be trained here"):
        starting_model(TrainOptions(Path("run"), preset="fasterrcnn-r50-fpn"), COLOURS, watcher())


def test_a_detr_keeps_all_but_its_class_head_and_queries_on_other_data(tmp_path: Path, watcher: type[Any]) -> None:
    config = get_preset(
        "detr-r50", backbone="resnet-tiny", hidden_dim=64, encoder_layers=1, decoder_layers=1, classes=2, queries=9
    )
    path = tmp_path / "detr.safetensors"
    save_checkpoint(path, build_detector(config), COLOURS)
    progress = watcher()
    fruit = ClassTable((1, 2, 3), ("cherry", "plum", "fig"))
    model = starting_model(TrainOptions(Path("run"), init=str(path), queries=5), fruit, progress)
    state, old = model.state_dict(), _state(path)
    assert state["class_embed.weight"].shape == (3 + 1, 64)
    renewed = {name for name, tensor in old.items() if not torch.equal(tensor, state[name])}
    assert renewed == {"class_embed.weight", "class_embed.bias", "query_embed.weight"}
    assert len(progress.warnings) == 2


def test_the_recipe_follows_family_and_trunk_and_keeps_the_ratio_of_the_rates() -> None:
    options = TrainOptions(Path("run"), batch_size=4, learning_rate=1e-3)
    paper = starting_recipe(options, get_preset("r50"))
    assert (paper.schedule, paper.augmentation, paper.epochs, paper.batch_size) == ("step", "paper", 50, 4)
    assert (paper.learning_rate, paper.backbone_rate) == pytest.approx((1e-3, 1e-4))
    detr = starting_recipe(options, get_preset("detr-r50-dc5"))
    assert (detr.schedule, detr.augmentation, detr.epochs, detr.batch_size) == ("step", "paper", 300, 4)
    assert (detr.learning_rate, detr.backbone_rate) == pytest.approx((1e-3, 1e-4))
    scratch = starting_recipe(options, get_preset("tiny"))
    assert (scratch.schedule, scratch.augmentation, scratch.epochs) == ("cosine", "jitter", 100)
    assert (scratch.learning_rate, scratch.backbone_rate) == pytest.approx((1e-3, 1e-3))


def test_starting_from_a_model_is_fine_tuning_at_a_lower_rate_in_fewer_epochs() -> None:
    options = TrainOptions(Path("run"), init="some.safetensors")
    tuned = starting_recipe(options, get_preset("r50"))
    assert (tuned.epochs, tuned.schedule, tuned.warmup_steps, tuned.ema_decay) == (25, "cosine", 100, 0.997)
    assert (tuned.learning_rate, tuned.backbone_rate) == pytest.approx(
        (2.5e-5, 2.5e-6)
    )  # of batch 2, half of batch 8's
    tiny = starting_recipe(options, get_preset("tiny"))
    assert (tiny.epochs, tiny.batch_size, tiny.augmentation) == (40, 8, "jitter")
    assert (tiny.learning_rate, tiny.backbone_rate) == pytest.approx((3e-4, 3e-4))


def test_options_reach_the_recipe_and_a_batch_is_that_of_all_processes() -> None:
    options = TrainOptions(
        Path("run"), schedule="step", warmup=7, ema=0.5, accumulate=2, freeze="backbone", patience=3
    )  # fmt: skip
    recipe = starting_recipe(options, get_preset("r50"), processes=8)
    assert (recipe.batch_size, recipe.learning_rate) == (16, pytest.approx(1e-4))
    found = (
        recipe.schedule,
        recipe.warmup_steps,
        recipe.ema_decay,
        recipe.accumulate,
        recipe.freeze,
        recipe.patience,
    )
    assert found == ("step", 7, 0.5, 2, "backbone", 3)
    assert starting_recipe(TrainOptions(Path("run"), batch_size=16), get_preset("r50"), 8).batch_size == 16
