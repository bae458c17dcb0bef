"""A data set of coloured squares, small enough to train on inside a test, and a run's options and watcher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.train.options import TrainOptions

COLOURS = {3: (200, 40, 40), 11: (40, 60, 210)}


def _write_split(root: Path, name: str, count: int, seed: int, names: tuple[str, str] = ("red", "blue")) -> None:
    """``count`` pictures of 64x48 with one or two squares, and annotations/<name>.json."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        picture = Image.new("RGB", (64, 48), (90, 90, 90))
        for _ in range(int(rng.integers(1, 3))):
            category = int(rng.choice(list(COLOURS)))
            side = int(rng.integers(12, 24))
            x, y = int(rng.integers(0, 64 - side)), int(rng.integers(0, 48 - side))
            picture.paste(COLOURS[category], (x, y, x + side, y + side))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": category, "bbox": [x, y, side, side],
                 "area": side * side, "iscrowd": 0}
            )  # fmt: skip
        picture.save(root / "images" / f"{name}{i}.png")
        images.append({"id": i, "file_name": f"{name}{i}.png", "width": 64, "height": 48})
    categories = [{"id": 11, "name": names[1]}, {"id": 3, "name": names[0]}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def write_split() -> Callable[..., None]:
    """Writes one more split: (root, name, count, seed, names of the two classes)."""
    return _write_split


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train (6 pictures), val (2)."""
    root = tmp_path_factory.mktemp("squares")
    _write_split(root, "train", 6, seed=1)
    _write_split(root, "val", 2, seed=2)
    return root


class Watcher:
    """Collects what a run tells; can end it after an epoch, as a kill would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.stop_after = stop_after

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """Nothing to keep."""

    def epoch(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.stop_after == row["epoch"]:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def watcher() -> type[Watcher]:
    """Makes one: () or (stop_after=epoch)."""
    return Watcher


@pytest.fixture(scope="session")
def small_options(squares: Path) -> Callable[..., TrainOptions]:
    """Options of a short run on the squares into (output), with any of them changed."""

    def options(output: Path, **changes: Any) -> TrainOptions:
        values: dict[str, Any] = {
            "data": squares, "preset": "tiny", "epochs": 2, "batch_size": 3, "image_size": 48, "queries": 9,
            "device": "cpu",
        }  # fmt: skip
        return TrainOptions(output=output, **{**values, **changes})

    return options
