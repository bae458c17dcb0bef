from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr_cli.errors import CheckpointError, DatasetError, DivergedError, OutputError, UsageError
from ddetr_cli.train import loop
from ddetr_cli.train.options import TrainOptions, resumed_options
from ddetr_cli.train.run import run_training
from ddetr_cli.weights import load_model

Options = Callable[..., TrainOptions]


def test_a_run_leaves_a_model_metrics_and_its_configuration(
    small_options: Options, watcher: type[Any], tmp_path: Path
) -> None:
    progress = watcher()
    result = run_training(small_options(tmp_path / "run"), progress)
    run = tmp_path / "run"
    assert result.best == run / "best.safetensors"
    assert progress.warnings == []

    loaded = load_model(str(run))
    assert loaded.config.preset == "tiny"
    assert (loaded.config.classes, loaded.config.queries, loaded.config.image_size) == (2, 9, 48)
    assert loaded.classes.category_ids == (3, 11) and loaded.classes.names == ("red", "blue")

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows == progress.rows
    assert {"loss", "loss_ce", "loss_bbox", "loss_giou", "loss_ce_1", "loss_ce_enc"} <= set(rows[0])
    assert rows[1]["val"]["images"] == 2 and set(rows[1]["val"]["per_class"]) == {"red", "blue"}

    config = json.loads((run / "config.json").read_text())
    # The second of 100 warm-up steps and the cosine's first quarter: 2 steps an epoch, 4 in all.
    expected = config["recipe"]["learning_rate"] * 2 / 100 * 0.8535534
    assert rows[0]["learning_rate"] == pytest.approx(expected)
    assert config["data"]["train"]["image_count"] == 6
    assert config["model"] == loaded.config.to_dict()


def test_the_best_epoch_by_validation_is_kept(
    small_options: Options, watcher: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddetr_cli.evaluate.metrics import CocoMetrics
    from ddetr_cli.train import run as train_run

    scores = iter([0.2, 0.5, 0.5])
    overall = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"))

    def scored(self: Any) -> CocoMetrics:
        return CocoMetrics(overall={**overall, "AP": next(scores)}, images=1, detections=0, per_class={})

    monkeypatch.setattr(train_run._Run, "_validate", scored)
    result = run_training(small_options(tmp_path / "run", epochs=3), watcher())
    assert (result.best_epoch, result.best_ap) == (2, 0.5)
    best, last = (load_model(str(tmp_path / "run" / f"{name}.safetensors")).model for name in ("best", "last"))
    assert not torch.equal(best.class_embed[0].weight, last.class_embed[0].weight)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    small_options: Options, watcher: type[Any], tmp_path: Path
) -> None:
    run_training(small_options(tmp_path / "whole"), watcher())
    with pytest.raises(KeyboardInterrupt):
        run_training(small_options(tmp_path / "cut"), watcher(stop_after=1))
    # What a kill after the second epoch's line, but before its state, leaves behind.
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2}\n{"epo')
    resumed = watcher()
    run_training(resumed_options(tmp_path / "cut", device="cpu", workers=None), resumed)
    assert [row["epoch"] for row in resumed.rows] == [2]
    assert any("going on after epoch 1 of 2" in note for note in resumed.notes)
    whole, cut = (load_model(str(tmp_path / name / "last.safetensors")) for name in ("whole", "cut"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, cut.model.state_dict()[name]), name
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    assert [len(line) for line in lines] == [2, 2]
    assert json.loads(lines[0][1])["val"] == json.loads(lines[1][1])["val"]


def test_resuming_needs_the_same_classes_and_recipe(
    small_options: Options, watcher: type[Any], tmp_path: Path, write_split: Callable[..., None]
) -> None:
    for split in ("train", "val"):
        write_split(tmp_path / "data", split, 3, seed=3)
    run = tmp_path / "run"
    run_training(small_options(run, data=tmp_path / "data", epochs=1), watcher())
    config = json.loads((run / "config.json").read_text())
    config["options"]["learning_rate"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another learning_rate, backbone_rate"):
        run_training(resumed_options(run, device="cpu", workers=None), watcher())
    for split in ("train", "val"):
        write_split(tmp_path / "data", split, 3, seed=3, names=("cherry", "plum"))
    with pytest.raises(DatasetError, match="other classes"):
        run_training(resumed_options(run, device="cpu", workers=None), watcher())


def test_the_loss_falls_while_training(small_options: Options, watcher: type[Any], tmp_path: Path) -> None:
    progress = watcher()
    run_training(small_options(tmp_path / "run", epochs=12, eval_every=12, learning_rate=1e-3), progress)
    assert [row["epoch"] for row in progress.rows if "val" in row] == [12]
    assert progress.rows[-1]["loss"] < 0.8 * progress.rows[0]["loss"]


def test_a_run_that_exists_is_refused_and_overwriting_starts_anew(
    small_options: Options, watcher: type[Any], tmp_path: Path
) -> None:
    options = small_options(tmp_path / "run", epochs=1)
    run_training(options, watcher())
    with pytest.raises(OutputError, match="is not empty"):
        run_training(options, watcher())
    run_training(small_options(tmp_path / "run", epochs=1, overwrite=True), watcher())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_mistyped_data_set_costs_neither_the_old_run_nor_the_name_of_a_new_one(
    small_options: Options, watcher: type[Any], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "best.safetensors").write_bytes(b"weeks of work")
    for run in (old, tmp_path / "new"):
        with pytest.raises(UsageError, match="nowhere"):
            run_training(small_options(run, data=tmp_path / "nowhere", overwrite=run == old), watcher())
    assert (old / "best.safetensors").read_bytes() == b"weeks of work"
    # The second attempt with the same --output is not told that it exists.
    with pytest.raises(UsageError, match="nowhere"):
        run_training(small_options(tmp_path / "new", data=tmp_path / "nowhere"), watcher())


def test_a_loss_that_stays_not_finite_ends_the_run(
    small_options: Options, watcher: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_finite(self: Any, output: Any, targets: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return output.logits.sum() * float("nan"), {}

    monkeypatch.setattr(loop.Criterion, "__call__", not_finite)
    with pytest.raises(DivergedError, match="10 steps in a row"):
        run_training(small_options(tmp_path / "run", epochs=9, eval_every=9), watcher())
