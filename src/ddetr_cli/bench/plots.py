"""The pictures of ``ddetr bench --plot``: the systems of the card, and time against the size of a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr_cli.bench.card import CardSection
from ddetr_cli.bench.scaling import AREA, LEVELS, QUERIES, Curve, ScalingSection
from ddetr_cli.bench.tables import Section
from ddetr_cli.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Beside the colours, for eyes and printers that do not tell them apart.
MARKERS = "osD^vPX*"


def plot_sections(sections: Sequence[Section], path: Path) -> None:
    """Draw the card or the curves among ``sections`` to ``path``, whose ending says what kind of picture it is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), dpi=150, layout="constrained")
    for section in sections:
        if isinstance(section, CardSection):
            _draw_card(section, figure.subplots(1, 2))
        elif isinstance(section, ScalingSection):
            _draw_scaling(section, figure.subplots(1, 3))
    figure.savefig(path)


def _draw_card(section: CardSection, axes: Sequence[Axes]) -> None:
    """Published AP against the time of one picture, published on the left and measured on the right."""
    rows = [row for row in section.rows if row.published is not None]
    for ax, title in zip(axes, ("published, V100, batch 1", "measured here, batch 1"), strict=True):
        for index, row in enumerate(rows):
            published = row.published
            assert published is not None
            style: dict[str, Any] = {
                "color": COLOURS[index % len(COLOURS)],
                "marker": MARKERS[index % len(MARKERS)],
                "ms": 8,
                "ls": "",
            }
            if ax is axes[0]:
                ax.plot(1e3 / published.rate_batch1, published.ap, label=row.name, **style)
            else:
                for speed in row.speeds:
                    low, high = speed.times.quartiles
                    middle = speed.times.median
                    ax.errorbar(
                        1e3 * middle,
                        published.ap,
                        xerr=[[1e3 * (middle - low)], [1e3 * (high - middle)]],
                        mfc="none" if speed is not row.speeds[0] else None,
                        label=f"{row.name} {speed.precision}",
                        **style,
                    )
        ax.set(title=title, xlabel="ms per picture", ylabel="published AP on val2017, %", xscale="log")
        _plain_ticks(ax.xaxis)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)


def _draw_scaling(section: ScalingSection, axes: Sequence[Axes]) -> None:
    """Times against pixels with the fitted lines, against queries and against levels."""
    curves = {quantity: [c for c in section.curves if c.quantity == quantity] for quantity in (AREA, QUERIES, LEVELS)}
    titles = {AREA: "area", QUERIES: "queries", LEVELS: "levels"}
    for ax, (quantity, found) in zip(axes, curves.items(), strict=True):
        for index, curve in enumerate(found):
            _draw_curve(ax, curve, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
        ax.set(title=f"time against {titles[quantity]}", ylabel="ms per picture")
        ax.set_xlabel("megapixels of what the model sees" if quantity == AREA else quantity)
        if quantity == AREA:
            ax.set(xscale="log", yscale="log")
            _plain_ticks(ax.xaxis)
            _plain_ticks(ax.yaxis)
        else:
            ax.set_xticks(sorted({point.value for curve in found for point in curve.points}))
            ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3, which="both")
        if found:
            ax.legend(fontsize=8)


def _plain_ticks(axis: Axis) -> None:
    """Numbers a reader knows (20, 50, 100) on a logarithmic axis, instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_curve(ax: Axes, curve: Curve, colour: str, marker: str) -> None:
    unit = 1e6 if curve.quantity == AREA else 1
    xs = [point.value / unit for point in curve.points]
    ys = [1e3 * point.times.median for point in curve.points]
    label = f"{curve.model} {curve.precision}"
    if curve.quantity != AREA:
        ax.plot(xs, ys, color=colour, marker=marker, label=label)
        return
    exponent = curve.time_exponent
    # The fitted line passes through the middle of the points, in logarithms.
    middle_x, middle_y = (sum(map(math.log, values)) / len(values) for values in (xs, ys))
    line = [math.exp(middle_y + exponent.value * (math.log(x) - middle_x)) for x in xs]
    ax.plot(xs, line, color=colour, lw=1, ls="--")
    ax.plot(xs, ys, color=colour, marker=marker, ls="", label=f"{label}: pixels^({exponent})")
