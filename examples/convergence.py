"""Draw how fast trainings converge: AP and AP of small objects of several runs against epochs.

    python examples/convergence.py RUN [RUN ...] --output FILE

reads the metrics.jsonl and config.json that ``ddetr train`` writes, prints a table, and draws FILE with matplotlib.
What the lines mean depends on what the runs have in common; nothing here checks that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PANELS = {"AP": "AP, all objects", "APs": "AP, small objects (under 32x32 pixels)"}
# Okabe and Ito's, which colour-blind eyes tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def read_run(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """The preset of a run, and the lines of its metrics that have a validation."""
    preset = json.loads((run / "config.json").read_text())["model"]["preset"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return preset, [row for row in rows if "val" in row]


def draw(runs: list[tuple[str, list[dict[str, Any]]]], path: Path) -> None:
    """One panel for each of ``PANELS``, one line for each run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
        for colour, (preset, rows) in zip(COLOURS, runs, strict=False):
            epochs, values = [row["epoch"] for row in rows], [row["val"][key] or 0.0 for row in rows]
            axes.plot(epochs, values, color=colour, marker="o", markersize=3, label=preset)
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folder of ddetr train")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to draw (.png, .svg)")
    arguments = parser.parse_args()
    runs = [read_run(run) for run in arguments.runs]
    print(f"{'preset':<20}{'epochs':>8}{'AP':>8}{'AP50':>8}{'APs':>8}{'minutes':>9}")
    for run, (preset, rows) in zip(arguments.runs, runs, strict=True):
        every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = rows[-1]["val"]
        numbers = "".join(f"{last[key] or 0.0:8.3f}" for key in ("AP", "AP50", "APs"))
        print(f"{preset:<20}{rows[-1]['epoch']:>8}{numbers}{sum(row['seconds'] for row in every) / 60:9.1f}")
    draw(runs, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
