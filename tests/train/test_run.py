from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddetr_cli.errors import DatasetError, DeviceError, DivergedError, OutputError, UsageError
from ddetr_cli.presets import DETR, PRESETS
from ddetr_cli.train import dataset, epochs, loop
from ddetr_cli.train.checkpoints import read_snapshot
from ddetr_cli.train.options import TrainOptions, resumed_options
from ddetr_cli.train.run import run_training
from ddetr_cli.weights import load_model
from ddetr_cli.weights.checkpoint import digest

pytestmark = pytest.mark.usefixtures("nano")
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


def test_a_detr_is_trained_resumed_and_read_back(
    small_options: Options, watcher: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(
        PRESETS["detr-r50"], backbone="resnet-tiny", hidden_dim=64, encoder_layers=1, decoder_layers=2, ffn_dim=32
    )
    monkeypatch.setitem(PRESETS, "detr-r50", small)
    with pytest.raises(KeyboardInterrupt):
        run_training(small_options(tmp_path / "run", preset="detr-r50"), watcher(stop_after=1))
    progress = watcher()
    run_training(resumed_options(tmp_path / "run"), progress)
    (row,) = progress.rows
    assert row["epoch"] == 2 and row["skipped_steps"] == 0 and row["val"]["images"] == 2
    # Its class loss weighs 1, where Deformable DETR's weighs 2.
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    expected = sum(weights[name] * (row[name] + row[f"{name}_0"]) for name in weights)
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    config = load_model(str(tmp_path / "run")).config
    assert (config.family, config.classes, config.queries) == (DETR, 2, 9)


def test_the_best_epoch_by_validation_is_kept(
    small_options: Options, watcher: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddetr_cli.evaluate.metrics import CocoMetrics
    from ddetr_cli.train import validation

    scores = iter([0.2, 0.5, 0.5])
    overall = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"))

    def scored(*_: Any) -> CocoMetrics:
        return CocoMetrics(overall={**overall, "AP": next(scores)}, images=1, detections=0, per_class={})

    monkeypatch.setattr(validation, "evaluate_detections", scored)
    result = run_training(small_options(tmp_path / "run", epochs=3), watcher())
    assert (result.best_epoch, result.best_ap) == (2, 0.5)
    best, last = (load_model(str(tmp_path / "run" / f"{name}.safetensors")).model for name in ("best", "last"))
    assert not torch.equal(best.class_embed[0].weight, last.class_embed[0].weight)


def test_the_loss_falls_while_training(small_options: Options, watcher: type[Any], tmp_path: Path) -> None:
    progress = watcher()
    run_training(small_options(tmp_path / "run", epochs=12, eval_every=12, learning_rate=1e-2, warmup=0), progress)
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


def test_a_loss_that_stays_not_finite_ends_the_run_with_both_states_kept(
    small_options: Options, watcher: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, ordinary = itertools.count(), loop.Criterion.__call__

    def not_finite(self: Any, *args: Any, **more: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, terms = ordinary(self, *args, **more)
        return (total if next(calls) < 3 else total * float("nan")), terms

    monkeypatch.setattr(loop.Criterion, "__call__", not_finite)
    run, progress = tmp_path / "run", watcher()
    with pytest.raises(DivergedError, match="10 steps in a row") as caught:
        run_training(small_options(run, epochs=99, eval_every=99), progress)
    assert caught.value.exit_code == 9 and "step-000000" in str(caught.value)
    assert [row["skipped_steps"] for row in progress.rows] == [0, 1, 2, 2, 2, 2]
    # The weights of both are those of the third step: a skipped one changes nothing.
    kept = [read_snapshot(path) for path in (max((run / "checkpoints").iterdir()), run / "diverged.safetensors")]
    assert [snapshot.facts["bad_in_a_row"] for snapshot in kept] == [9, 10]
    assert digest(kept[0].tensors) == digest(kept[1].tensors)


@pytest.mark.parametrize(("save_every", "newest"), [(10, 8), (0, 9)])
def test_a_run_whose_last_step_is_found_to_diverge_late_does_not_end_well(
    save_every: float,
    newest: int,
    small_options: Options,
    watcher: type[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, ordinary = itertools.count(), loop.Criterion.__call__

    def not_finite(self: Any, *args: Any, **more: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, terms = ordinary(self, *args, **more)
        return (total if next(calls) < 4 else total * float("nan")), terms

    monkeypatch.setattr(loop.Criterion, "__call__", not_finite)
    monkeypatch.setattr(loop.Trainer, "is_late", property(lambda _: True, lambda *_: None), raising=False)
    run, progress = tmp_path / "run", watcher()
    with pytest.raises(DivergedError, match=r"10 steps in a row.*step-000000.*diverged\.safetensors") as caught:
        run_training(small_options(run, epochs=7, eval_every=7, save_every=save_every), progress)
    assert caught.value.exit_code == 9
    assert [row["skipped_steps"] for row in progress.rows] == [0, 0, 2, 2, 2, 2]
    kept = [read_snapshot(path) for path in (max((run / "checkpoints").iterdir()), run / "diverged.safetensors")]
    assert [snapshot.facts["bad_in_a_row"] for snapshot in kept] == [newest, 10]
    assert digest(kept[0].tensors) == digest(kept[1].tensors)


def test_out_of_memory_names_what_helps_and_keeps_the_checkpoint(
    small_options: Options, watcher: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = loop.Trainer.step

    def too_much(self: loop.Trainer, *args: Any, **more: Any) -> Any:
        if self.steps_done == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return ordinary(self, *args, **more)

    monkeypatch.setattr(loop.Trainer, "step", too_much)
    with pytest.raises(DeviceError, match=r"out of memory.* --override --accumulate N") as caught:
        run_training(small_options(tmp_path / "run"), watcher())
    assert caught.value.exit_code == 8
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002.safetensors"]


def test_pictures_that_vanish_while_training_are_replaced_up_to_a_limit(
    watcher: type[Any], small_options: Options, tmp_path: Path, write_split: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dataset, "CACHE_BYTES", 0)
    for split in ("train", "val"):
        write_split(tmp_path / "data", split, 6, seed=3)

    class Remover(watcher):  # type: ignore[misc]
        def epoch(self, row: dict[str, Any]) -> None:
            super().epoch(row)
            (tmp_path / "data" / "images" / f"train{row['epoch']}.png").unlink()

    run, progress = tmp_path / "run", Remover()
    with pytest.raises(DatasetError, match="2 of 6 training images became unreadable") as caught:
        run_training(small_options(run, data=tmp_path / "data", epochs=9), progress)
    assert caught.value.exit_code == 6
    assert [row.get("unreadable_images") for row in progress.rows] == [None, 1]
    assert sum("train1.png: " in text and "stands in for it" in text for text in progress.warnings) == 1
    assert f"{run}: saved. Go on with: ddetr train --resume {run}" in progress.warnings
    newest = max((run / "checkpoints").iterdir())
    assert read_snapshot(newest).facts["epoch"] == 2


def test_a_disk_with_little_room_is_warned_of_before_the_first_step(
    small_options: Options, watcher: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    progress = watcher()
    run_training(small_options(tmp_path / "run", epochs=1), progress)
    assert any("1.0 MB free, and a checkpoint takes" in text for text in progress.warnings)


def test_frozen_parts_keep_their_weights_and_statistics(
    small_options: Options, watcher: type[Any], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_training(small_options(first, epochs=1), watcher())
    options = small_options(
        second, preset=None, init=str(first / "last.safetensors"), freeze="encoder", image_size=None, ema=0.0,
        warmup=0, learning_rate=1e-2,
    )  # fmt: skip
    run_training(options, watcher())
    before, after = (load_model(str(run / "last.safetensors")).model.state_dict() for run in (first, second))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith(("backbone.", "input_proj.", "transformer.encoder.")) for name in moved)
    recipe = json.loads((second / "config.json").read_text())["recipe"]
    assert (recipe["freeze"], recipe["ema_decay"], recipe["warmup_steps"]) == ("encoder", 0.0, 0)


def test_a_run_tells_the_padding_it_has_and_would_have_and_what_its_cache_takes(
    small_options: Options, write_split: Callable[..., None], watcher: type[Any], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    write_split(data, "train", 12, seed=1)
    write_split(data, "val", 2, seed=2)
    progress = watcher()
    run_training(
        small_options(
            tmp_path / "run", data=data, epochs=1, batch_size=2, augmentation="paper", image_size=96, cache=True
        ),
        progress,
    )
    (told,) = (text for text in progress.notes if text.startswith("padding"))
    before, after = (float(number) for number in re.findall(r"(\d\.\d\d)x", told))
    assert 1.0 <= after < before
    assert progress.rows[0]["padding"] == pytest.approx(after, abs=0.006)
    assert "--cache: 12 decoded pictures take 0.0 GB of memory" in progress.notes
