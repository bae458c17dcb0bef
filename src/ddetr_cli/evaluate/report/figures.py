"""The plots of a report. Each says in its caption what is to be seen in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ddetr_cli.evaluate.accumulate import RECALLS
from ddetr_cli.evaluate.matching import IOU_THRESHOLDS, SIZES
from ddetr_cli.evaluate.measures import Calibration, SizeBin
from ddetr_cli.evaluate.mistakes import KINDS, MISSED, Mistakes
from ddetr_cli.evaluate.report.evaluated import Evaluated
from ddetr_cli.plots import COLOURS, DARK, GREY, LIGHT, new_figure
from ddetr_cli.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVES = 7  # more lines in one plot cannot be told apart
_NAMED = 4  # points of a scatter plot
_CONFUSED = 12  # classes of the confusion matrix


@dataclass(frozen=True)
class Plot:
    """One figure: ``name`` is that of its file, ``alt`` says it in words for who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


def short_name(name: str, longest: int = 18) -> str:
    """A class name as a plot has room for it, without what matplotlib would take for mathematics."""
    text = printable(name).replace("$", r"\$")
    return text if len(text) <= longest else text[: longest - 1] + "…"


def precision_recall_by_class(run: Evaluated) -> Plot:
    """At IoU 0.50: the classes with the most objects, and the mean of all."""
    figure, axes = _curve_axes()
    precision = run.curves.precision[0, :, :, 0]  # (recalls, classes)
    present = np.flatnonzero(precision[0] > -1)
    busiest = present[np.argsort(-run.objects_of_class[present], kind="stable")][:_CURVES]
    if len(present) > 1:
        mean = precision[:, present].mean(axis=1)
        axes.plot(RECALLS, mean, color=DARK, linewidth=2.4, label=f"all {len(present)} classes")
    for k, colour in zip(busiest, COLOURS, strict=False):
        axes.plot(RECALLS, precision[:, k], color=colour, linewidth=1.5, label=short_name(run.class_names[k]))
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    few = f" (the {_CURVES} with the most objects)" if len(present) > _CURVES else ""
    caption = f"At IoU 0.50, by class{few}. A curve that falls early: wrong detections with high scores."
    ap50 = run.metrics.overall["AP50"]
    alt = f"Precision against recall at IoU 0.50; AP50 is {ap50 or 0:.3f} over all classes."
    return Plot("precision_recall_classes", "Precision and recall by class", caption, alt, figure)


def precision_recall_by_size(run: Evaluated) -> Plot:
    """Mean over the classes for every size, at IoU 0.50 and 0.75."""
    figure, axes = _curve_axes()
    parts = []
    for index, (size, colour) in enumerate(zip(SIZES, (DARK, *COLOURS), strict=False)):
        for threshold, style in ((0.5, "-"), (0.75, ":")):
            values = run.curves.precision[np.isclose(IOU_THRESHOLDS, threshold)][0][:, :, index]
            present = values[0] > -1
            if not present.any():
                continue
            mean = values[:, present].mean(axis=1)
            axes.plot(RECALLS, mean, style, color=colour, linewidth=1.7, label=size if style == "-" else None)
            parts.append(f"{size} at {threshold}: {mean.mean():.3f}")
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    caption = "Mean of the classes; solid at IoU 0.50, dotted at 0.75. The further apart, the looser the boxes."
    return Plot("precision_recall_sizes", "Precision and recall by size", caption, "; ".join(parts), figure)


def calibration(found: Calibration) -> Plot:
    """How often detections of a score are right."""
    figure, axes = _curve_axes()
    axes.set_xlabel("score")
    axes.set_ylabel("share that is right (IoU 0.50)")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    there = np.flatnonzero(found.count)
    axes.bar((there + 0.5) / len(found.count), found.right[there], width=0.09, color=COLOURS[5])
    axes.plot(found.score[there], found.right[there], "o-", color=COLOURS[0], markersize=4, linewidth=1.2)
    for index in there:
        height = min(found.right[index] + 0.02, 0.97)
        axes.text((index + 0.5) / len(found.count), height, _count(found.count[index]), ha="center", fontsize=7)
    caption = (
        f"On the dashed line scores mean what they say; mean distance {found.error:.3f}. Above each bar: detections."
    )
    alt = f"Share of right detections for ten ranges of scores; the expected calibration error is {found.error:.3f}."
    return Plot("calibration", "Can scores be believed?", caption, alt, figure)


def ap_by_size(bins: Sequence[SizeBin]) -> Plot:
    """AP for ranges of object sizes."""
    figure, axes = new_figure()
    places = np.arange(len(bins))
    axes.bar(places - 0.2, [b.ap50 for b in bins], 0.38, color=COLOURS[5], label="AP50")
    axes.bar(places + 0.2, [b.ap for b in bins], 0.38, color=COLOURS[0], label="AP")
    axes.set_xticks(places, [f"{b.label}\n{_count(b.objects)}" for b in bins])
    axes.set_xlabel("side of the object in px (square root of its area), and how many", fontsize=9)
    axes.set_ylim(0, 1.02)
    axes.grid(visible=False, axis="x")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    caption = "Objects of other sizes are ignored for each pair of bars, as COCO does it for small, medium and large."
    alt = "; ".join(f"side {b.label} px: AP {b.ap:.3f} of {b.objects} objects" for b in bins)
    return Plot("ap_by_size", "AP against box size", caption, alt, figure)


def mistakes(runs: Sequence[tuple[str, Mistakes]]) -> Plot:
    """What each kind of mistake costs, for one run or several beside each other."""
    names = (*KINDS, MISSED)
    figure, axes = new_figure(height=1.4 + 0.34 * len(names) * max(len(runs), 1) ** 0.6)
    places, width = np.arange(len(names))[::-1], 0.8 / len(runs)
    for index, (label, found) in enumerate(runs):
        costs = [100 * found.cost[name] for name in names]
        offset = (len(runs) - 1) / 2 - index
        bars = axes.barh(places + offset * width, costs, width * 0.92, color=COLOURS[index], label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks(places, names)
    axes.set_xlabel("AP50 points gained if this alone were mended")
    axes.set_xlim(0, max(1.0, axes.get_xlim()[1] * 1.1))
    axes.grid(visible=False, axis="y")
    if len(runs) > 1:
        axes.legend(fontsize=8, frameon=False, loc="best")
    alt = "; ".join(f"{label}: " + ", ".join(f"{n} {100 * f.cost[n]:.1f}" for n in names) for label, f in runs)
    caption = "Kinds and costs as TIDE defines them (arXiv:2008.08115); they do not add up to what is missing."
    return Plot("mistakes", "What goes wrong", caption, alt, figure)


def ap_of_classes(first: Evaluated, second: Evaluated) -> Plot:
    """Every class as a point: AP of the first run against AP of the second."""
    figure, axes = new_figure()
    points = []
    for name in first.class_names:
        a, b = first.metrics.per_class[name]["AP"], second.metrics.per_class[name]["AP"]
        if a is not None and b is not None:
            points.append((a, b, name))
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    axes.scatter([a for a, _, _ in points], [b for _, b, _ in points], s=18, color=COLOURS[0])
    for a, b, name in sorted(points, key=lambda point: -abs(point[1] - point[0]))[:_NAMED]:
        axes.annotate(short_name(name), (a, b), (4, 3), textcoords="offset points", fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel(f"AP of {short_name(first.name, 36)}")
    axes.set_ylabel(f"AP of {short_name(second.name, 28)}")
    better = sum(b > a for a, b, _ in points)
    caption = f"Above the line the second is better: {better} of {len(points)} classes."
    return Plot("ap_of_classes", "AP of each class", caption, caption, figure)


def confusion(run: Evaluated) -> Plot:
    """What was said of what is there, at the score of the best F1; the rarest classes are put together."""
    matrix = run.verdicts.confusion
    classes = len(run.class_names)
    present = np.flatnonzero(matrix[:classes, :].sum(axis=1) + matrix[:, :classes].sum(axis=0))
    shown = present[np.argsort(-matrix[present].sum(axis=1), kind="stable")][:_CONFUSED]
    groups = [[k] for k in shown] + ([[k for k in present if k not in shown]] if len(present) > len(shown) else [])
    groups.append([classes])
    values = np.array([[matrix[np.ix_(rows, columns)].sum() for columns in groups] for rows in groups])
    names = [short_name(run.class_names[k], 14) for k in shown]
    names += [f"{len(present) - len(shown)} others"] if len(present) > len(shown) else []
    size = 2.2 + 0.42 * len(groups)
    figure, axes = new_figure(max(4.8, size), max(3.4, size * 0.9))
    share = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if value:
            colour = "white" if share[row, column] > 0.55 else DARK
            axes.text(column, row, _count(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(groups)), [*names, "nothing"], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(groups)), [*names, "nothing"])
    axes.set_xlabel("said")
    axes.set_ylabel("is there")
    axes.grid(visible=False)
    for edge in (-0.5, len(groups) - 1.5):
        axes.axhline(edge, color=LIGHT if edge < 0 else GREY, linewidth=0.8)
        axes.axvline(edge, color=LIGHT if edge < 0 else GREY, linewidth=0.8)
    caption = (
        f"Detections with scores from {run.verdicts.threshold:.3f} on. Last column: objects that were not found; "
        "last row: detections where nothing is. Colour: share of the row."
    )
    alt = f"Confusion of {len(shown)} classes and nothing; F1 is {run.verdicts.f1:.3f}."
    return Plot("confusion", "Confusion, with background", caption, alt, figure)


def _curve_axes() -> tuple[Figure, Axes]:
    figure, axes = new_figure()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    return figure, axes


def _count(value: float) -> str:
    value = int(value)
    return str(value) if value < 10_000 else f"{value / 1000:.0f}k"
