from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ddetr_cli.errors import UsageError
from ddetr_cli.plots import COLOURS, check_plots, new_figure, to_png, to_svg, write_png


def test_a_missing_matplotlib_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plots("--report")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"--report: matplotlib is not installed. Run pip install 'ddetr-cli\[plots\]'"
    ):
        check_plots("--report")


def test_a_figure_becomes_the_same_svg_every_time_and_a_png(tmp_path: Path) -> None:
    figure, axes = new_figure()
    axes.plot([0, 1], [1, 0], color=COLOURS[0])
    assert to_svg(figure) == to_svg(figure)
    assert b"</svg>" in to_svg(figure)
    assert to_png(figure).startswith(b"\x89PNG")
    write_png(figure, tmp_path / "plots/a.png")
    assert (tmp_path / "plots/a.png").read_bytes() == to_png(figure)
