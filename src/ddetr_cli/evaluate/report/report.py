"""The report of one run, put together."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ddetr_cli.atomic import write_atomically
from ddetr_cli.evaluate.measures import by_size, calibrate
from ddetr_cli.evaluate.metrics import METRICS
from ddetr_cli.evaluate.mistakes import KINDS, MEANINGS, MISSED
from ddetr_cli.evaluate.report import figures, page, pictures
from ddetr_cli.evaluate.report.evaluated import Evaluated
from ddetr_cli.plots import write_png

PAGE, PLOTS = "report.html", "plots"
_WORST = 12
_UNFOLDED = 20  # classes of the table that is shown at once


def write_report(run: Evaluated, output: Path, now: datetime) -> Path:
    """``output``/report.html and ``output``/plots/*.png; gives the path of the page. Raises OutputError."""
    plots = [
        figures.precision_recall_by_class(run),
        figures.precision_recall_by_size(run),
        figures.ap_by_size(by_size(run.ground_truth, run.table)),
        figures.mistakes([(run.name, run.mistakes)]),
        figures.confusion(run),
        figures.calibration(calibrate(run.matches, run.mistakes)),
    ]
    write_plots(plots, output)
    verdicts = run.verdicts
    sections = [
        page.tiles(run.metrics.overall, run.metrics.intervals),
        f'<p class="note">{_conclusion(run)}</p>',
        page.section("Precision, recall and size", page.plots(plots[:3])),
        page.section(
            "Mistakes",
            page.plots(plots[3:]),
            _kinds(run),
            note="A detection is right where it overlaps an object of its class by 0.50, best score first.",
        ),
        page.section("Classes", _classes(run)),
        page.section(
            "The worst pictures",
            page.gallery((pictures.picture(run, t), pictures.caption(run, t)) for t in pictures.worst(run, _WORST)),
            note=f"Most objects missed and wrong detections, at scores from {verdicts.threshold:.3f} on.",
        ),
        page.section(
            "All twelve numbers", _twelve(run), note="As pycocotools computes them, unrounded in metrics.json."
        ),
    ]
    title = f"{run.name} on {data_name(run.ground_truth.path)}"
    path = output / PAGE
    write_atomically(path, page.page(title, facts_of([run], now), sections).encode(), durable=True)
    return path


def write_plots(plots: Sequence[figures.Plot], output: Path) -> None:
    """Each as a PNG file under ``output``/plots."""
    for plot in plots:
        write_png(plot.figure, output / PLOTS / f"{plot.name}.png")


def data_name(annotations: Path) -> str:
    """The data set and its split, as a title has room for them: ``cells, val`` of cells/annotations/val.json."""
    folder = annotations.parent
    root = folder.parent if folder.name.lower() == "annotations" else folder
    return f"{root.name}, {annotations.stem}" if root.name else annotations.stem


def facts_of(runs: Sequence[Evaluated], now: datetime) -> list[str]:
    """What was measured, on what, when and by what."""
    truth = runs[0].ground_truth
    objects = int((~runs[0].matches.objects.is_ignored[:, 0]).sum())
    try:
        program = f"ddetr {version('ddetr-cli')}"
    except PackageNotFoundError:  # run from the source tree
        program = "ddetr"
    return [
        f"data: {truth.path}",
        f"{len(truth.images)} pictures, {objects} objects, {len(truth.categories)} classes",
        *(f"{run.name}: {len(run.table)} detections" for run in runs),
        now.strftime("%Y-%m-%d %H:%M"),
        program,
    ]


def _conclusion(run: Evaluated) -> str:
    verdicts = run.verdicts
    worst = max((*KINDS, MISSED), key=lambda kind: run.mistakes.cost[kind])
    return (
        f"With scores from <b>{verdicts.threshold:.3f}</b> on (the best F1, {verdicts.f1:.3f}) it is right in "
        f"{verdicts.precision:.1%} of what it says and finds {verdicts.recall:.1%} of the objects. The costliest "
        f"mistake is <b>{worst}</b>: {page.escape(MEANINGS[worst])}."
    )


def _kinds(run: Evaluated) -> str:
    kept = run.mistakes.kind[run.verdicts.kept]
    counts = {kind: int((kept == index).sum()) for index, kind in enumerate(KINDS)}
    counts[MISSED] = int((~run.verdicts.is_found & ~run.matches.objects.is_ignored[:, 0]).sum())
    rows = [
        [kind, f"{100 * run.mistakes.cost[kind]:.1f}", str(counts[kind]), page.escape(MEANINGS[kind])]
        for kind in sorted(counts, key=lambda kind: -run.mistakes.cost[kind])
    ]
    return page.table(["kind", "AP50 points", f"how many, score ≥ {run.verdicts.threshold:.2f}", "meaning"], rows)


def _classes(run: Evaluated) -> str:
    shown = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
    rows = [
        [page.escape(name), str(count), *(page.digits(run.metrics.per_class[name][key]) for key in shown)]
        for name, count in zip(run.class_names, run.objects_of_class.tolist(), strict=True)
    ]
    rows.sort(key=lambda row: -int(row[1]))
    headings = ["class", "objects", *shown]
    if len(rows) <= _UNFOLDED:
        return page.table(headings, rows)
    rest = f"the other {len(rows) - _UNFOLDED} classes, with fewer objects"
    return page.table(headings, rows[:_UNFOLDED]) + page.table(headings, rows[_UNFOLDED:], folded=rest)


def _twelve(run: Evaluated) -> str:
    intervals = run.metrics.intervals
    rows = []
    for name in METRICS:
        value, interval = run.metrics.overall[name], intervals.get(name)
        spread = "n/a" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        cells = [name, "n/a" if value is None else f"{value:.6f}", *([spread] if intervals else [])]
        rows.append([*cells, page.escape(page.definition(name))])
    return page.table(["number", "value", *(["95 % interval"] if intervals else []), "measured at"], rows)
