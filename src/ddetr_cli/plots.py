"""The common look of all plots, and how they are written: PNG files, and SVG that a page can hold.

matplotlib is an optional extra, and is imported only when something is drawn.
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING

from ddetr_cli.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, which colour-blind eyes tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#999933")
DARK, GREY, LIGHT = "#1a1a1a", "#8a8a8a", "#e6e6e6"


def check_plots(option: str) -> None:
    """Raise UsageError where nothing can be drawn; ``option`` is what asked for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{option}: matplotlib is not installed. Run pip install 'ddetr-cli[plots]'.")


def new_figure(width: float = 4.8, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure with one plot, of a size (inches) that is readable on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=DARK, labelsize=9, length=3)
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def to_png(figure: Figure) -> bytes:
    """The figure as a picture of 150 dots an inch."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes every time."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "ddetr"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def write_png(figure: Figure, path: Path) -> None:
    """``to_png`` at ``path``. Raises OutputError."""
    from ddetr_cli.atomic import write_atomically

    write_atomically(path, to_png(figure), durable=False)
