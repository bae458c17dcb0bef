"""RUN/curves.png: how a run goes, from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ddetr_cli.plots import COLOURS, DARK, GREY, LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What of a validation is drawn, and how it is called there.
SCORES = {"AP50": "AP50", "AP": "AP", "APs": "AP small"}


def draw_curves(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss, validation and learning rate against epochs; ``rows`` are those of metrics.jsonl, at least one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=10, color=DARK, x=0.01, ha="left")
    loss, scores, rate = figure.subplots(1, 3)
    for axes, name in ((loss, "training loss"), (scores, _validation_title(rows)), (rate, "learning rate")):
        _style(axes, name)
        axes.set_xlim(min(1, rows[-1]["epoch"] - 1), rows[-1]["epoch"])
    _line(loss, [(row["epoch"], row["loss"]) for row in rows if row.get("loss") is not None], COLOURS[0])
    for colour, (key, name) in zip(COLOURS, SCORES.items(), strict=False):
        points = [(row["epoch"], row["val"][key]) for row in rows if "val" in row and row["val"].get(key) is not None]
        _line(scores, points, colour, name)
    scores.set_ylim(0, 1)
    _line(rate, [(row["epoch"], row["learning_rate"]) for row in rows], COLOURS[0])
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def _style(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=9, color=DARK, loc="left")
    axes.set_xlabel("epoch", fontsize=9, color=DARK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=DARK, labelsize=8, length=3)
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)


def _line(axes: Axes, points: Sequence[tuple[int, float]], colour: str, name: str | None = None) -> None:
    if not points:
        return
    # A single epoch is a dot; of many the dots would hide the line.
    marker = "o" if len(points) <= 20 else None
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, linewidth=1.6, clip_on=False)
    if name is not None:
        axes.annotate(
            name, points[-1], (6, 0), textcoords="offset points", color=colour, fontsize=8, va="center",
            annotation_clip=False,
        )  # fmt: skip


def _validation_title(rows: Sequence[dict[str, Any]]) -> str:
    scored = [(row["val"]["AP"], row["epoch"]) for row in rows if "val" in row and row["val"].get("AP") is not None]
    if not scored:
        return "validation"
    best, epoch = max(scored, key=lambda pair: (pair[0], -pair[1]))
    return f"validation: best AP {best:.3f} in epoch {epoch}"
