"""The tables of ``ddetr eval`` on stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ddetr_cli.cli import console
from ddetr_cli.printable import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ddetr_cli.evaluate.metrics import CocoMetrics
    from ddetr_cli.evaluate.report.comparison import Comparison
    from ddetr_cli.evaluate.report.evaluated import Evaluated


def print_metrics(metrics: CocoMetrics, *, per_class: bool, sole_output: bool) -> None:
    """The numbers on stdout."""
    from rich import box

    style = box.SIMPLE_HEAD if sys.stdout.isatty() else None
    tables = [_overall_table(metrics, style)]
    if per_class:
        tables.append(_class_table(metrics, style))
    _print_tables(tables, sole_output=sole_output)


def print_comparison(found: Comparison, *, per_class: bool, sole_output: bool) -> None:
    """The numbers of two runs beside each other, and what changed."""
    from rich import box

    style = box.SIMPLE_HEAD if sys.stdout.isatty() else None
    runs = (found.first, found.second)
    tables = [_two_columns("metric", runs, style), _two_columns("mistake, AP50 points", runs, style)]
    if found.intervals:
        tables[0].add_column("95 % interval", justify="right")
    for name, difference in found.difference.items():
        interval = found.intervals.get(name)
        spread = "n/a" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
        values = [_number(run.metrics.overall[name]) for run in runs]
        tables[0].add_row(name, *values, _signed(difference), *([spread] if found.intervals else []))
    for kind, cost in found.first.mistakes.cost.items():
        costs = [100 * cost, 100 * found.second.mistakes.cost[kind]]
        tables[1].add_row(kind, *(f"{value:.2f}" for value in costs), f"{costs[1] - costs[0]:+.2f}")
    if per_class:
        tables.append(_two_columns("category, AP", runs, style))
        for name, first, second, difference in found.class_differences():
            tables[-1].add_row(printable(name), _number(first), _number(second), _signed(difference))
    _print_tables(tables, sole_output=sole_output)
    only = [int(flags.sum()) for flags in (found.only_first, found.only_second)]
    console.say(
        f"objects found by {printable(runs[0].name)} alone: {only[0]}, by {printable(runs[1].name)} alone: {only[1]} "
        "(IoU 0.50, each at the score of its best F1)"
    )


def _print_tables(tables: Sequence[Table], *, sole_output: bool) -> None:
    """Drawn on a terminal, aligned plain columns in a file or pipe."""
    for table in tables:
        if sys.stdout.isatty():
            console.rich_console(stdout=True).print(table)
        else:
            text = "\n".join(line.rstrip() for line in console.render(table).splitlines())
            console.write_result(text + "\n", sole_output=sole_output)


def _two_columns(heading: str, runs: tuple[Evaluated, Evaluated], style: object) -> Table:
    from rich.table import Table

    table = Table(box=style, pad_edge=False)  # type: ignore[arg-type]
    table.add_column(heading, overflow="ellipsis", no_wrap=True, max_width=40)
    for name in (*(printable(run.name) for run in runs), "difference"):
        table.add_column(name, justify="right")
    return table


def _signed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:+.6f}"


def _overall_table(metrics: CocoMetrics, style: object) -> Table:
    from rich.table import Table

    from ddetr_cli.evaluate.metrics import DEFINITIONS

    table = Table(box=style, pad_edge=False)  # type: ignore[arg-type]
    for heading in ("metric", "IoU", "size", "per image"):
        table.add_column(heading)
    table.add_column("value", justify="right")
    if metrics.intervals:
        table.add_column("95 % interval", justify="right")
    for name, (_, iou, size, limit) in DEFINITIONS.items():
        threshold = "0.50:0.95" if iou is None else f"{iou:.2f}"
        interval = metrics.intervals.get(name)
        spread = "n/a" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        cells = [name, threshold, size, str(limit), _number(metrics.overall[name])]
        table.add_row(*cells, *([spread] if metrics.intervals else []))
    return table


def _class_table(metrics: CocoMetrics, style: object) -> Table:
    from rich.table import Table

    shown = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
    table = Table(box=style, pad_edge=False)  # type: ignore[arg-type]
    table.add_column("category", overflow="ellipsis", no_wrap=True, max_width=40)
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, numbers in metrics.per_class.items():
        table.add_row(printable(name), *(_number(numbers[key]) for key in shown))
    return table


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6f}"
