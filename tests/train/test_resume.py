"""Going on with a run: exactly as if it had never been interrupted, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ddetr_cli.errors import CheckpointError, DatasetError, UsageError
from ddetr_cli.train.checkpoints import Snapshot, read_snapshot
from ddetr_cli.train.options import TrainOptions, resumed_options
from ddetr_cli.train.run import run_training
from ddetr_cli.weights import tensorfile
from ddetr_cli.weights.checkpoint import digest

pytestmark = pytest.mark.usefixtures("nano")
Options = Callable[..., TrainOptions]
TIMES = {"seconds", "wait_seconds", "images_per_second", "bottleneck"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def left(run: Path) -> dict[str, tuple[dict[str, str], str]]:
    """What else a finished run leaves: of each model and of the newest checkpoint the header and all numbers."""
    paths = [run / "best.safetensors", run / "last.safetensors", newest(run)]
    return {path.name: (metadata, digest(tensors)) for path in paths for metadata, tensors in [tensorfile.read(path)]}


def test_a_run_cut_after_every_single_step_ends_with_the_bytes_of_an_uninterrupted_one(
    small_options: Options, watcher: type[Any], tmp_path: Path
) -> None:
    class Cut(watcher):  # type: ignore[misc]
        def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
            super().step(epoch, step, steps, loss)
            if len(self.losses) == 2:  # the checkpoint of the first is written, the second is lost
                raise KeyboardInterrupt

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_training(small_options(whole, batch_size=2), watcher())
    with pytest.raises(KeyboardInterrupt):
        run_training(small_options(cut, batch_size=2, save_every=0.0), Cut())
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run_training(resumed_options(cut), Cut())
    run_training(resumed_options(cut), watcher())
    assert [row["epoch"] for row in metrics(cut)] == [1, 2]
    assert metrics(cut) == metrics(whole)
    assert left(cut) == left(whole)


@pytest.fixture
def run(tmp_path: Path, small_options: Options, watcher: type[Any]) -> Path:
    """A run stopped after the first of two epochs, with the checkpoints of its last two steps."""
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_training(small_options(run, batch_size=2, save_every=0.0), watcher(stop_after=1))
    assert steps(run) == [2, 3]
    return run


def steps(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    run: Path, watcher: type[Any], small_options: Options, tmp_path: Path
) -> None:
    content = newest(run).read_bytes()
    newest(run).write_bytes(content[: len(content) // 2])
    progress = watcher()
    run_training(resumed_options(run), progress)
    assert any("step-00000003.safetensors: truncated or damaged" in text for text in progress.warnings)
    assert any("going on after epoch 0 of 2 and 2 of 3 steps" in text for text in progress.notes)
    run_training(small_options(tmp_path / "whole", batch_size=2), watcher())
    assert left(run) == left(tmp_path / "whole")


def test_a_flipped_bit_is_noticed(run: Path, watcher: type[Any]) -> None:
    content = bytearray(newest(run).read_bytes())
    content[-1000] ^= 1
    newest(run).write_bytes(content)
    progress = watcher()
    run_training(resumed_options(run), progress)
    assert any("does not match its checksum" in text for text in progress.warnings)


def test_where_every_checkpoint_is_damaged_nothing_starts_and_nothing_is_deleted(
    run: Path, watcher: type[Any]
) -> None:
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged") as caught:
        run_training(resumed_options(run), watcher())
    assert caught.value.exit_code == 5
    assert steps(run) == [2, 3]


def test_the_newest_checkpoint_is_that_of_the_most_steps_whatever_the_clock_said(
    run: Path, watcher: type[Any]
) -> None:
    os.utime(newest(run), (1, 1))
    progress = watcher()
    run_training(resumed_options(run), progress)
    assert any("going on after epoch 1 of 2." in text for text in progress.notes)


def rewritten(path: Path, change: Callable[[Snapshot], Snapshot]) -> None:
    """Replace a checkpoint by a changed one whose checksum is right."""
    from ddetr_cli.train import checkpoints

    snapshot = change(read_snapshot(path))
    header = {
        "format": 1,
        "facts": snapshot.facts,
        "sha256": checkpoints._checksum(snapshot.tensors, snapshot.facts),
    }
    safetensors.torch.save_file(dict(snapshot.tensors), path, {"ddetr-run": json.dumps(header)})


def test_weights_that_are_not_finite_are_refused_and_an_older_good_checkpoint_is_named(
    run: Path, watcher: type[Any]
) -> None:
    def poison(snapshot: Snapshot) -> Snapshot:
        name = "model/class_embed.0.bias"
        return Snapshot(
            {**snapshot.tensors, name: torch.full_like(snapshot.tensors[name], torch.nan)}, snapshot.facts
        )

    rewritten(newest(run), poison)
    with pytest.raises(CheckpointError, match=r"bias holds NaN .*step-00000002\.safetensors before it is good"):
        run_training(resumed_options(run), watcher())


def test_an_optimizer_of_other_parameters_is_refused(run: Path, watcher: type[Any]) -> None:
    def swap(snapshot: Snapshot) -> Snapshot:
        names = list(snapshot.facts["trained"])
        return Snapshot(snapshot.tensors, {**snapshot.facts, "trained": [names[1], names[0], *names[2:]]})

    rewritten(newest(run), swap)
    with pytest.raises(CheckpointError, match="another list of parameters") as caught:
        run_training(resumed_options(run), watcher())
    assert caught.value.exit_code == 5


def test_a_checkpoint_of_another_model_is_refused(run: Path, watcher: type[Any]) -> None:
    def cut(snapshot: Snapshot) -> Snapshot:
        tensors = {
            name: tensor for name, tensor in snapshot.tensors.items() if not name.startswith("model/class_embed")
        }
        return Snapshot(tensors, snapshot.facts)

    rewritten(newest(run), cut)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        run_training(resumed_options(run), watcher())


def test_a_run_without_a_checkpoint_says_so(run: Path, watcher: type[Any]) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run_training(resumed_options(run), watcher())


def test_a_finished_run_trains_nothing_and_says_how_to_go_on(run: Path, watcher: type[Any]) -> None:
    run_training(resumed_options(run), watcher())
    before, progress = left(run), watcher()
    result = run_training(resumed_options(run), progress)
    (warning,) = progress.warnings
    assert "all 2 epochs are done" in warning and "Nothing is left to train" in warning
    assert progress.losses == [] and left(run) == before and result.best_epoch >= 1


def test_options_that_differ_are_refused_by_name_unless_overridden(run: Path, watcher: type[Any]) -> None:
    with pytest.raises(UsageError, match=r"started with epochs 2, not 3.*--override"):
        resumed_options(run, {"epochs": 3})
    with pytest.raises(UsageError, match=r"preset tiny, not r50.*--init"):
        resumed_options(run, {"preset": "r50"}, override=True)
    assert resumed_options(run, {"epochs": 2, "keep": 7, "workers": 1}).keep == 7
    # Left to the recipe at the start, and equal to what it chose.
    assert resumed_options(run, {"augmentation": "jitter", "warmup": 100}).warmup == 100
    progress = watcher()
    run_training(resumed_options(run, {"epochs": 3, "learning_rate": 1e-5}, override=True), progress)
    assert [row["epoch"] for row in progress.rows] == [2, 3]
    recipe = json.loads((run / "config.json").read_text())["recipe"]
    assert (recipe["epochs"], recipe["learning_rate"], recipe["batch_size"]) == (3, 1e-5, 2)
    # The new numbers are the run's from now on.
    assert resumed_options(run).epochs == 3


def test_another_batch_size_goes_on_at_the_same_share_of_the_epoch(
    tmp_path: Path, small_options: Options, watcher: type[Any]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_training(small_options(run, batch_size=1, save_every=0.0), _cut_after(watcher, 5)())
    progress = watcher()
    run_training(resumed_options(run, {"batch_size": 3}, override=True), progress)
    # 4 of 6 pictures are done: one step of 3 of the first epoch is left, and two of the second.
    assert len(progress.losses) == 3
    recipe = json.loads((run / "config.json").read_text())["recipe"]
    assert recipe["learning_rate"] == pytest.approx(5e-4 * (3 / 8) ** 0.5)  # of the new batch


def _cut_after(watcher: type[Any], count: int) -> type[Any]:
    class Cut(watcher):  # type: ignore[misc]
        def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
            super().step(epoch, step, steps, loss)
            if len(self.losses) == count:
                raise KeyboardInterrupt

    return Cut


def test_another_data_set_is_refused_with_what_has_changed(
    tmp_path: Path, small_options: Options, watcher: type[Any], write_split: Callable[..., None]
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for split in ("train", "val"):
        write_split(data, split, 4, seed=3)
    with pytest.raises(KeyboardInterrupt):
        run_training(small_options(run, data=data, batch_size=2), watcher(stop_after=1))
    write_split(data, "train", 5, seed=3)
    with pytest.raises(DatasetError, match=r"train: 5 images instead of 4") as caught:
        run_training(resumed_options(run), watcher())
    assert caught.value.exit_code == 6
    write_split(data, "train", 4, seed=3)
    (data / "images" / "val0.png").write_bytes((data / "images" / "val0.png").read_bytes() + b" ")
    with pytest.raises(DatasetError, match="val: the sizes of its picture files"):
        run_training(resumed_options(run), watcher())
    progress = watcher()
    run_training(resumed_options(run, override=True), progress)
    assert [row["epoch"] for row in progress.rows] == [2]


def test_other_classes_are_refused_even_with_override(
    tmp_path: Path, small_options: Options, watcher: type[Any], write_split: Callable[..., None]
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for split in ("train", "val"):
        write_split(data, split, 3, seed=3)
    run_training(small_options(run, data=data, epochs=1), watcher())
    for split in ("train", "val"):
        write_split(data, split, 3, seed=3, names=("cherry", "plum"))
    with pytest.raises(DatasetError, match="other classes"):
        run_training(resumed_options(run, override=True), watcher())


def test_a_run_ends_when_validation_gets_no_better(
    tmp_path: Path, small_options: Options, watcher: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddetr_cli.evaluate.metrics import METRICS, CocoMetrics
    from ddetr_cli.train import validation

    scores = iter([0.2, 0.5, 0.5, 0.4, 0.6])

    def scored(*_: Any) -> CocoMetrics:
        return CocoMetrics({**dict.fromkeys(METRICS), "AP": next(scores)}, images=1, detections=0)

    monkeypatch.setattr(validation, "evaluate_detections", scored)
    progress = watcher()
    result = run_training(small_options(tmp_path / "run", epochs=9, patience=2), progress)
    assert [row["epoch"] for row in progress.rows] == [1, 2, 3, 4]
    assert (result.best_epoch, result.best_ap) == (2, 0.5)
    again = watcher()
    run_training(resumed_options(tmp_path / "run"), again)
    assert again.losses == [] and "2 validations without a better AP" in again.warnings[0]
