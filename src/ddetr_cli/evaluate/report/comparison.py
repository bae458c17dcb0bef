"""Two runs on the same data beside each other: which numbers, mistakes and objects changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from ddetr_cli.atomic import write_atomically
from ddetr_cli.evaluate.bootstrap import SEED, Resampling, spread
from ddetr_cli.evaluate.matching import Flags
from ddetr_cli.evaluate.metrics import METRICS, Interval, Numbers
from ddetr_cli.evaluate.mistakes import KINDS, MISSED
from ddetr_cli.evaluate.report import figures, page, pictures
from ddetr_cli.evaluate.report.evaluated import Evaluated
from ddetr_cli.evaluate.report.report import data_name, facts_of, write_plots

PAGE = "comparison.html"
_CHANGED = 8  # pictures


@dataclass(frozen=True)
class Comparison:
    """``difference`` is second minus first, None where either has no number; ``only`` (G,) found by one alone.

    An object is found where a detection of its class overlaps it by 0.5 at the run's own best score.
    """

    first: Evaluated
    second: Evaluated
    difference: Numbers
    intervals: dict[str, Interval | None]
    only_first: Flags
    only_second: Flags

    def class_differences(self) -> list[tuple[str, float | None, float | None, float | None]]:
        """(class, AP of the first, of the second, difference), the largest change first."""
        rows = []
        for name in self.first.class_names:
            a, b = self.first.metrics.per_class[name]["AP"], self.second.metrics.per_class[name]["AP"]
            rows.append((name, a, b, _minus(b, a)))
        return sorted(rows, key=lambda row: -abs(row[3] or 0.0))


def compare(
    first: Evaluated, second: Evaluated, samples: int | None = None, *, on_sample: Callable[[], object] = lambda: None
) -> Comparison:
    """What changed from one run to the other; with ``samples``, 95 % intervals of the differences.

    Both runs are scored on the same drawn images each time, so the intervals are those of the difference itself.
    """
    numbers = {name: _minus(second.metrics.overall[name], first.metrics.overall[name]) for name in METRICS}
    counted = ~first.matches.objects.is_ignored[:, 0]
    a, b = first.verdicts.is_found & counted, second.verdicts.is_found & counted
    intervals: dict[str, Interval | None] = {}
    if samples is not None:
        one, other = Resampling(first.matches), Resampling(second.matches)
        random, images = np.random.default_rng(SEED), len(first.ground_truth.images)
        draws = []
        for _ in range(samples):
            times = np.bincount(random.integers(0, images, images), minlength=images)
            draws.append(np.array(other.of(times)) - np.array(one.of(times)))
            on_sample()
        intervals = spread(np.array(draws))
    return Comparison(first, second, numbers, intervals, a & ~b, b & ~a)


def write_comparison(found: Comparison, output: Path, now: datetime) -> Path:
    """``output``/comparison.html and ``output``/plots/*.png; gives the path of the page. Raises OutputError."""
    first, second = found.first, found.second
    plots = [
        figures.ap_of_classes(first, second),
        figures.mistakes([(first.name, first.mistakes), (second.name, second.mistakes)]),
    ]
    write_plots(plots, output)
    sections = [
        page.section("Numbers", _numbers(found)),
        page.section("What changed", page.plots(plots), _kinds(found)),
        page.section("Classes", _classes(found), note="The largest change first."),
        page.section(
            "Pictures that changed most",
            page.gallery(_pairs(found), kind="pairs"),
            note=f"{int(found.only_first.sum())} objects are found by {page.escape(first.name)} alone, "
            f"{int(found.only_second.sum())} by {page.escape(second.name)} alone. First on the left, second on the "
            "right, each at the score of its own best F1.",
        ),
    ]
    title = f"{first.name} and {second.name} on {data_name(first.ground_truth.path)}"
    path = output / PAGE
    write_atomically(path, page.page(title, facts_of([first, second], now), sections).encode(), durable=True)
    return path


def _minus(second: float | None, first: float | None) -> float | None:
    return None if first is None or second is None else second - first


def _signed(value: float | None, *, unit: float = 1.0, decimals: int = 3, more_is_better: bool = True) -> str:
    """HTML: a difference with its sign, coloured by what it means."""
    if value is None:
        return "n/a"
    text = f"{unit * value:+.{decimals}f}"
    if float(text) == 0:
        return text
    return f'<span class="{"better" if (value > 0) == more_is_better else "worse"}">{text}</span>'


def _numbers(found: Comparison) -> str:
    rows = []
    for name in METRICS:
        interval = found.intervals.get(name)
        told = "n/a" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"
        values = [page.digits(run.metrics.overall[name]) for run in (found.first, found.second)]
        cells = [name, *values, _signed(found.difference[name]), *([told] if found.intervals else [])]
        rows.append([*cells, page.escape(page.definition(name))])
    spread_column = ["95 % interval"] if found.intervals else []
    headings = ["number", found.first.name, found.second.name, "difference", *spread_column, "measured at"]
    return page.table(headings, rows)


def _kinds(found: Comparison) -> str:
    rows = []
    for kind in (*KINDS, MISSED):
        costs = [run.mistakes.cost[kind] for run in (found.first, found.second)]
        difference = _signed(costs[1] - costs[0], unit=100, decimals=1, more_is_better=False)
        rows.append([kind, *(f"{100 * cost:.1f}" for cost in costs), difference])
    return page.table(["mistake, AP50 points", found.first.name, found.second.name, "difference"], rows)


def _classes(found: Comparison) -> str:
    rows = [
        [page.escape(name), page.digits(a), page.digits(b), _signed(difference)]
        for name, a, b, difference in found.class_differences()
    ]
    headings = ["class, AP", found.first.name, found.second.name, "difference"]
    shown = page.table(headings, rows[:20])
    return shown + (
        page.table(headings, rows[20:], folded=f"the other {len(rows) - 20} classes") if rows[20:] else ""
    )


def _pairs(found: Comparison) -> list[tuple[str, str]]:
    changed = np.bincount(
        found.first.matches.objects.image[found.only_first | found.only_second],
        minlength=len(found.first.ground_truth.images),
    )
    firsts, seconds = pictures.tallies(found.first), pictures.tallies(found.second)
    items = []
    for position in np.argsort(-changed, kind="stable")[:_CHANGED].tolist():
        if changed[position]:
            a, b = firsts[position], seconds[position]
            both = pictures.picture(found.first, a) + pictures.picture(found.second, b)
            name = page.escape(found.first.ground_truth.images[position].file_name)
            told = f"{len(a.found)} and {len(b.found)} found, {len(a.wrong)} and {len(b.wrong)} wrong"
            items.append((f'<div class="pair">{both}</div>', f"<b>{name}</b>: {told}"))
    return items
