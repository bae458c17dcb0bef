"""``ddetr eval --compare``: two runs on the same data, side by side."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ddetr_cli.cli import console
from ddetr_cli.cli.eval_tables import print_comparison

if TYPE_CHECKING:
    from ddetr_cli.data.coco import CocoAnnotations
    from ddetr_cli.evaluate.report.comparison import Comparison
    from ddetr_cli.evaluate.table import DetectionTable


def results_file(path: Path) -> Path:
    """The detections of a run: those in an --output folder, or the file itself."""
    return path / "detections.json" if path.is_dir() else path


def run_name(path: Path) -> str:
    """What to call the run of a model, results file or folder: its name, with the folder where that says more."""
    if path.name in ("detections.json", "best.safetensors", "last.safetensors"):
        return f"{path.absolute().parent.name}/{path.name}" if path.exists() else path.name
    return path.absolute().name if path.exists() else str(path)


def compare_runs(
    paths: tuple[Path, Path],
    tables: tuple[DetectionTable, DetectionTable],
    ground_truth: CocoAnnotations,
    images: Path | None,
    *,
    output: Path | None,
    report: bool,
    bootstrap: int | None,
    per_class: bool,
) -> None:
    """Print what changed, and write comparison.json and, where asked for, the page into ``output``."""
    from ddetr_cli.atomic import write_json
    from ddetr_cli.evaluate.report.comparison import compare
    from ddetr_cli.evaluate.report.evaluated import evaluated

    names = [run_name(path) for path in paths]
    if names[0] == names[1]:
        names = ["A", "B"]
    first, second = (evaluated(name, ground_truth, images, table) for name, table in zip(names, tables, strict=True))
    with console.Progress(bootstrap or 0, unit="samples", description="bootstrap", quiet=not bootstrap) as progress:
        found = compare(first, second, bootstrap, on_sample=progress.advance)
    if output is not None:
        write_json(output / "comparison.json", _content(found))
        written = [output / "comparison.json"]
        if report:
            from ddetr_cli.evaluate.report.comparison import write_comparison

            written.append(write_comparison(found, output, datetime.now().astimezone()))
        console.say(f"written: {', '.join(map(str, written))}")
    print_comparison(found, per_class=per_class, sole_output=output is None)


def _content(found: Comparison) -> dict[str, object]:
    return {
        "first": {"name": found.first.name, **found.first.metrics.to_json(per_class=True)},
        "second": {"name": found.second.name, **found.second.metrics.to_json(per_class=True)},
        "difference": found.difference,
        **({"intervals": found.intervals} if found.intervals else {}),
        "mistakes": {"first": found.first.mistakes.cost, "second": found.second.mistakes.cost},
        "objects_found_by_first_only": int(found.only_first.sum()),
        "objects_found_by_second_only": int(found.only_second.sum()),
    }
