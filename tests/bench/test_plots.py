"""The pictures of a measurement."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ddetr_cli.bench.options import CARD, SCALING, BenchOptions
from ddetr_cli.bench.plots import plot_sections
from ddetr_cli.bench.run import run_bench

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.mark.parametrize("measurement", [CARD, SCALING])
def test_a_measurement_is_drawn(measurement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddetr_cli.bench.scaling.AREA_SHARES", (1.0, 4.0))
    monkeypatch.setattr("ddetr_cli.bench.card.peak_process_memory", lambda *_: None)
    options = BenchOptions(
        ("r50-single-scale" if measurement == CARD else "tiny",), size_hw=(64, 64), precisions=("fp32",),
        device="cpu", rounds=2, warmup=1, measurements=(measurement,),
    )  # fmt: skip
    sections = run_bench(options).sections
    plot_sections(sections, tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.size == (1800, 675)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    plot_sections(sections, tmp_path / "drawn.svg")
    assert "<svg" in (tmp_path / "drawn.svg").read_text()
