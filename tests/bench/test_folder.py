"""A folder from files to files against the model alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.bench.folder import FolderResult, FolderSection, measure_folder
from ddetr_cli.bench.options import BenchOptions
from ddetr_cli.bench.subjects import open_model
from ddetr_cli.bench.tables import Silence
from ddetr_cli.bench.timing import Samples
from ddetr_cli.errors import NothingUsableError
from ddetr_cli.inference.predictor import Predictor

CPU = torch.device("cpu")
OPTIONS = BenchOptions(("tiny",), size_hw=(64, 85), precisions=("fp32", "bf16"), device="cpu", rounds=2)


class Run:
    """Predicts nothing, but calls back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = sorted(folder.iterdir())
        self.runs: list[tuple[str, int, bool]] = []

    def __call__(self, predictor: Predictor, on_picture: Callable[[], None], *, draws: bool) -> None:
        self.runs.append((predictor.precision, predictor.image_size, draws))
        for _ in self.pictures:
            on_picture()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    return tmp_path


def measured(folder: Path) -> tuple[Run, FolderSection]:
    run = Run(folder)
    return run, measure_folder(OPTIONS, [open_model("tiny", Silence())], CPU, run, Silence())


def test_every_precision_runs_over_the_folder_in_every_round_at_the_size_asked_for(folder: Path) -> None:
    run, section = measured(folder)
    expected = [(precision, 64, draws) for precision in ("bf16", "fp32") for draws in (False, True)]
    assert sorted(run.runs) == sorted(2 * expected)
    found = [(result.precision, result.output) for result in section.results]
    assert found == [(precision, output) for precision in ("fp32", "bf16") for output in ("boxes", "boxes, pictures")]


def test_memory_is_noted_after_every_picture(folder: Path) -> None:
    _, section = measured(folder)
    assert all(len(result.resident) == 3 for result in section.results)
    assert all(value > 1 << 20 for result in section.results for value in result.resident)


def test_a_picture_that_cannot_be_read_does_not_stand_for_the_others(folder: Path) -> None:
    (folder / "0.png").write_text("no picture")
    _, section = measured(folder)
    assert section.pictures == 3


def test_a_folder_without_a_readable_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(NothingUsableError, match="no picture could be read"):
        measured(tmp_path)


def test_efficiency_is_the_rate_of_the_run_as_a_share_of_the_pure_one() -> None:
    result = FolderResult("m", "fp32", "boxes", Samples((0.5, 0.4)), Samples((0.4, 0.4)), tuple(range(1, 61)))
    assert result.efficiency == Samples((0.8, 1.0))
    assert (result.settled_peak, max(result.resident)) == (50, 60)
    (table,) = FolderSection(Path("photos"), 60, (result,)).tables()
    assert "MiB at 50" in table.headings
