"""A data set of coloured squares, small enough to train on inside a test, and a run's options and watcher."""

from __future__ import annotations

import json
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.train.options import TrainOptions

# ``tiny`` made so small that a step takes milliseconds and a checkpoint a megabyte; with dropout, to see it repeated.
# Not narrower: of 1x1 convolutions with stride 2 and 8 channels, oneDNN (torch 2.15) corrupts memory on two threads.
NANO = """
from dataclasses import replace
from torch import nn
from ddetr_cli.model.backbone import BACKBONES, BackboneSpec, BasicBlock
from ddetr_cli.presets import PRESETS
BACKBONES["resnet-tiny"] = BackboneSpec(BasicBlock, 16, 3, (16, 16, 16, 16), (1, 1, 1, 1), nn.BatchNorm2d, ())
PRESETS["tiny"] = replace(
    PRESETS["tiny"], hidden_dim=64, heads=2, encoder_layers=1, decoder_layers=3, ffn_dim=32, dropout=0.1
)
"""

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
        self.losses: list[float] = []
        self.paces: list[Any] = []
        self.stop_after = stop_after

    def pace(self, pace: Any) -> None:
        self.paces.append(pace)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        self.losses.append(loss)

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


@pytest.fixture
def nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within this process ``tiny`` is of almost no size."""
    from ddetr_cli.model.backbone import BACKBONES
    from ddetr_cli.presets import PRESETS

    for table in (BACKBONES, PRESETS):
        name = "resnet-tiny" if table is BACKBONES else "tiny"
        monkeypatch.setitem(table, name, table[name])  # put back afterwards
    exec(NANO, {})


@pytest.fixture(scope="session")
def nano_code() -> str:
    """Code that makes ``tiny`` nano in the process that runs it."""
    return NANO


class Trainings:
    """Starts ``ddetr`` with a nano ``tiny``, each in a process of its own."""

    def __init__(self, context: ForkServerContext) -> None:
        self._context = context

    def start(self, arguments: list[str], log: Path, *, before: str = "") -> BaseProcess:
        """``ddetr *arguments``, after the code ``before``; what it says goes to ``log``."""
        code = (
            f"import os, signal, sys, torch\nos.setsid()\ntorch.set_num_threads(1)\n{NANO}\n"
            # A shell's background job ignores Ctrl-C, and so does all that it starts.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"talk = os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
            "os.dup2(talk, 1)\nos.dup2(talk, 2)\n"
            f"sys.stdout = open(1, 'w', closefd=False)\nsys.stderr = open(2, 'w', closefd=False)\n{before}\n"
            f"from ddetr_cli.cli.app import main\nsys.exit(main({arguments!r}))"
        )
        process = self._context.Process(target=exec, args=(code, {}))
        process.start()
        return process

    def run(self, arguments: list[str], log: Path, *, before: str = "") -> int | None:
        """Its exit code, or None where it did not end within two minutes."""
        process = self.start(arguments, log, before=before)
        process.join(120)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None
        return process.exitcode


@pytest.fixture(scope="session")
def trainings(forkserver: ForkServerContext) -> Trainings:
    """Starts trainings of a nano model in processes that may be killed."""
    return Trainings(forkserver)


@pytest.fixture(scope="session")
def dozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train (12 pictures), val (3)."""
    root = tmp_path_factory.mktemp("dozen")
    _write_split(root, "train", 12, seed=1)
    _write_split(root, "val", 3, seed=2)
    return root
