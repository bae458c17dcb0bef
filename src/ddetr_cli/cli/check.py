"""How ``ddetr train --check`` shows what it found: two small tables, then the findings by what becomes of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ddetr_cli.cli import console
from ddetr_cli.printable import printable

if TYPE_CHECKING:
    from rich.table import Table

    from ddetr_cli.data.findings import Outcome
    from ddetr_cli.train.check import DataReport, SplitFacts

# Heading and colour of the findings, the worst first.
_OUTCOMES: dict[Outcome, tuple[str, str]] = {
    "refused": ("refused: no training starts with", "bold red"),
    "dropped": ("dropped: left out, the files stay as they are", "yellow"),
    "repaired": ("repaired: in memory, the files stay as they are", "yellow"),
    "background": ("background: trained on as pictures with nothing to find", "cyan"),
    "noted": ("noted: taken as it is", "cyan"),
}
_NOTHING = ("nothing to repair, nothing to note", "green")
_CLASSES_SHOWN = 24  # with more of them the most and the least frequent


def show_report(report: DataReport, *, sole_output: bool) -> None:
    """The report on stdout: with lines and colours on a terminal, plain text in a file or pipe."""
    from rich import box

    is_terminal = sys.stdout.isatty()
    style = box.SIMPLE_HEAD if is_terminal else None
    tables = [_facts_table(report, style), _class_table(report, style)] if report.train or report.val else []
    if is_terminal:
        from rich.table import Table
        from rich.text import Text

        terminal = console.rich_console(stdout=True)
        for table in tables:
            terminal.print(table)
        for (heading, colour), lines in _findings(report):
            terminal.print(Text(heading, style=colour))
            grid = Table.grid(padding=(0, 1))
            for part, sentence in lines:
                grid.add_row(f"  {part}:", Text(sentence))
            terminal.print(grid)
    else:
        drawn = [line.rstrip() for table in tables for line in (*console.render(table).splitlines(), "")]
        for (heading, _), lines in _findings(report):
            drawn += [heading, *(f"  {part}: {sentence}" for part, sentence in lines)]
        console.write_result("\n".join(drawn) + "\n", sole_output=sole_output)


def _findings(report: DataReport) -> list[tuple[tuple[str, str], list[tuple[str, str]]]]:
    """(heading, its colour) with (split, sentence) of each finding; a heading alone where there is nothing to say."""
    found = {
        title: [(part, printable(f.sentence())) for part, f in report.findings if f.outcome == outcome]
        for outcome, title in _OUTCOMES.items()
    }
    return [(title, lines) for title, lines in found.items() if lines] or [(_NOTHING, [])]


def _facts_table(report: DataReport, style: object) -> Table:
    from rich.table import Table

    table = Table(box=style, pad_edge=False)  # type: ignore[arg-type]
    table.add_column("", no_wrap=True)
    splits = [("train", report.train), ("val", report.val)]
    present = [(name, facts) for name, facts in splits if facts is not None]
    for name, _ in present:
        table.add_column(name, justify="right", overflow="fold")
    rows = [_fact_cells(facts, report) for _, facts in present]
    for heading in rows[0]:
        table.add_row(heading, *(row[heading] for row in rows))
    return table


def _fact_cells(facts: SplitFacts, report: DataReport) -> dict[str, str]:
    short = report.config.image_size
    decoded = {0: "not looked for", 1: "all decoded"}.get(
        facts.decoded_every, f"every {facts.decoded_every}th decoded"
    )
    width, height = facts.commonest_size

    def share(count: int) -> str:
        return f"{count:,} ({count / facts.boxes:.1%})" if facts.boxes else "0"

    return {
        "annotations": Path(facts.annotations).name,
        "images": f"{facts.images:,}",
        "  without boxes": f"{facts.images_without_boxes:,}",
        "  pixels (headers: all)": decoded,
        "  commonest size": f"{width}x{height} ({facts.commonest_size_share:.0%})",
        "  width / height": f"{facts.aspect_least:.2f} to {facts.aspect_most:.2f}",
        "boxes": f"{facts.boxes:,}",
        "  small (area under 32x32)": share(facts.small),
        "  medium": share(facts.medium),
        "  large (96x96 and more)": share(facts.large),
        f"  under 16 px at short side {short}": share(facts.few_pixels),
        f"  per image ({report.config.queries} queries)": (
            f"median {facts.boxes_per_image_median:g}, most {facts.boxes_per_image_most:,}"
        ),
        "crowd regions": f"{facts.crowd_regions:,}",
    }


def _class_table(report: DataReport, style: object) -> Table:
    from rich.table import Table

    table = Table(box=style, pad_edge=False)  # type: ignore[arg-type]
    table.add_column("class", no_wrap=True, overflow="ellipsis", max_width=40)
    for heading in ("train boxes", "share", "val boxes"):
        table.add_column(heading, justify="right", no_wrap=True)
    train = report.train.boxes_per_class if report.train else {}
    val = report.val.boxes_per_class if report.val else {}
    total = sum(train.values()) or 1
    names = sorted({**train, **val}, key=lambda name: -train.get(name, 0))
    half = _CLASSES_SHOWN // 2
    for position, name in enumerate(names):
        if len(names) <= _CLASSES_SHOWN or not half <= position < len(names) - half:
            count = train.get(name, 0)
            table.add_row(printable(name), f"{count:,}", f"{count / total:.1%}", f"{val.get(name, 0):,}")
        elif position == half:
            table.add_row(f"... {len(names) - 2 * half} more", "", "", "")
    return table
