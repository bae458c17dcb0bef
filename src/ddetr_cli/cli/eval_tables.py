"""The tables of ``ddetr eval`` on stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ddetr_cli.cli import console

if TYPE_CHECKING:
    from rich.table import Table

    from ddetr_cli.evaluate.metrics import CocoMetrics


def print_metrics(metrics: CocoMetrics, *, per_class: bool, sole_output: bool) -> None:
    """The numbers on stdout: a drawn table on a terminal, aligned plain columns in a file or pipe."""
    from rich import box

    is_terminal = sys.stdout.isatty()
    style = box.SIMPLE_HEAD if is_terminal else None
    tables = [_overall_table(metrics, style)]
    if per_class:
        tables.append(_class_table(metrics, style))
    for table in tables:
        if is_terminal:
            console.rich_console(stdout=True).print(table)
        else:
            text = "\n".join(line.rstrip() for line in console.render(table).splitlines())
            console.write_result(text + "\n", sole_output=sole_output)


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

    from ddetr_cli.printable import printable

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
