from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddetr_cli.errors import UsageError
from ddetr_cli.train import views
from ddetr_cli.train.options import TrainOptions, resumed_options
from ddetr_cli.train.run import run_training

pytestmark = pytest.mark.usefixtures("nano")
Options = Callable[..., TrainOptions]


def frame(
    image: Image.Image, boxes: Sequence[Any], labels: Sequence[int], scores: Sequence[float], names: Sequence[str]
) -> Image.Image:
    """Draws nothing, and checks what it is given."""
    assert len(boxes) == len(labels) == len(scores) == len(names)
    assert all(score >= 0.3 for score in scores) and set(names) <= {"red", "blue"}
    return image.copy()


def test_a_validation_leaves_curves_and_pictures_and_a_new_start_clears_them(
    small_options: Options, watcher: type[Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'ddetr-cli[plots]'")
    run = tmp_path / "run"
    run_training(small_options(run, eval_every=2), watcher(), draw=frame)
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["epoch_002_val0.jpg", "epoch_002_val1.jpg"]
    with Image.open(run / "curves.png") as curves:
        assert curves.width > 3 * curves.height > 900
    run_training(small_options(run, epochs=1, overwrite=True), watcher())
    assert not (run / "curves.png").exists() and not list((run / "pictures").iterdir())


def test_pictures_show_what_was_found_with_some_confidence(
    small_options: Options, watcher: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "SHOWN_SCORE", 0.0)
    drawn: list[tuple[Any, ...]] = []

    def draw(image: Image.Image, *found: Any) -> Image.Image:
        drawn.append(found)
        return image.copy()

    run_training(small_options(tmp_path / "run", epochs=1), watcher(), draw=draw)
    boxes, labels, scores, names = drawn[0]
    assert len(boxes) == len(names) == 18  # 9 queries, 2 classes
    assert {names[i] for i, label in enumerate(labels) if label == 0} == {"blue"}  # the first in the file
    assert list(scores) == sorted(scores, reverse=True)


def test_without_matplotlib_there_are_no_curves_and_one_line_says_how_to_get_them(
    small_options: Options, watcher: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a)
    )
    progress = watcher()
    run_training(small_options(tmp_path / "run"), progress, draw=frame)
    (warning,) = progress.warnings
    assert "pip install 'ddetr-cli[plots]'" in warning
    assert len(progress.rows) == 2 and len(list((tmp_path / "run" / "pictures").iterdir())) == 4


def test_what_cannot_be_drawn_does_not_end_a_run(small_options: Options, watcher: type[Any], tmp_path: Path) -> None:
    def broken(*_: Any) -> Image.Image:
        raise OSError(28, "No space left on device")

    progress = watcher()
    result = run_training(small_options(tmp_path / "run"), progress, draw=broken)
    assert result.best.is_file() and len(progress.rows) == 2
    warnings = [text for text in progress.warnings if "pictures" in text]
    assert len(warnings) == 1 and "No space left on device" in warnings[0]


def test_tensorboard_gets_the_rows_of_metrics_also_after_resuming(
    small_options: Options, watcher: type[Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'ddetr-cli[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_training(small_options(run, tensorboard=True), watcher(stop_after=1))
    progress = watcher()
    run_training(resumed_options(run), progress)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (last,) = (event.value for event in events.Scalars("loss") if event.step == 2)
    assert last == pytest.approx(progress.rows[-1]["loss"], rel=1e-6)
    assert "val/AP50" in events.Tags()["scalars"]


def test_tensorboard_that_is_missing_is_named_before_anything_is_written(
    small_options: Options, watcher: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a)
    )
    with pytest.raises(UsageError, match=r"pip install 'ddetr-cli\[tensorboard\]'"):
        run_training(small_options(tmp_path / "run", tensorboard=True), watcher())
    assert not (tmp_path / "run").exists()
