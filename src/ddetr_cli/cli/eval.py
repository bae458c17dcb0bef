"""``ddetr eval``: COCO's twelve numbers for a model on a data set, or for a results file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ddetr_cli.cli import console
from ddetr_cli.cli.predictor import (
    DEFAULT_MODEL,
    MODEL_HELP,
    BatchSize,
    Device,
    ImageSize,
    Precision,
    Preprocess,
    Preset,
    check_model_options,
    open_predictor,
)
from ddetr_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from ddetr_cli.data.coco import CocoAnnotations
    from ddetr_cli.evaluate.metrics import CocoMetrics
    from ddetr_cli.evaluate.table import DetectionTable


def evaluate(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Data set in COCO's format (a COCO root, its val2017/ folder, or a folder with images/ and "
            "annotations/<split>.json), in YOLO's (data.yaml) or Pascal VOC's (Annotations/*.xml). Not needed with "
            "--annotations.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", show_default=DEFAULT_MODEL, help=MODEL_HELP),
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option(
            "--predictions",
            metavar="FILE",
            help="Score this COCO results file, not a model. Give it again for each part of one result.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            show_default="val2017, val, valid or the only one",
            help="Which annotation file of DATA, by name.",
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Folder of the images, instead of DATA's own.")
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option("--annotations", metavar="FILE", help="Annotation file, instead of one found in DATA."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for detections.json and metrics.json; refused if it exists.",
        ),
    ] = None,
    evaluator: Annotated[
        Literal["fast", "pycocotools"],
        typer.Option("--evaluator", help="Who computes the numbers; both give the same, to the last bit."),
    ] = "fast",
    per_class: Annotated[bool, typer.Option("--per-class", help="Also show the numbers of every category.")] = False,
    image_size: ImageSize = None,
    precision: Precision = "fp32",
    preprocess: Preprocess = "original",
    batch_size: BatchSize = 8,
    preset: Preset = None,
    device: Device = "auto",
    map_missing: Annotated[
        Literal["error", "drop"],
        typer.Option("--map-missing", help="A predicted class the data set does not have: stop, or leave it out."),
    ] = "error",
    skip_bad_annotations: Annotated[
        bool, typer.Option("--skip-bad-annotations", help="Leave out annotations that are refused otherwise.")
    ] = False,
    max_bad: Annotated[
        float,
        typer.Option("--max-bad", min=0, max=1, help="The share of all that may be left out; more is refused."),
    ] = 0.05,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use only the first N images of the data set.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into an existing --output.")] = False,
) -> None:
    """Score a model, or a results file, on a data set in COCO format: AP and AR as pycocotools computes them."""
    predictions = predictions or []
    if predictions and model is not None:
        raise UsageError(
            "--predictions and --model: contradict each other (a results file needs no model). Give one."
        )
    for file in predictions:
        if not file.exists():
            raise UsageError(f"{file}: no such results file. Check the path of --predictions.")
    if len(set(predictions)) < len(predictions):
        raise UsageError("--predictions: one file is given twice. Give each part once.")
    model = DEFAULT_MODEL if model is None else model
    check_model_options(model, device=device, preset=preset)

    from ddetr_cli.atomic import check_new_folder
    from ddetr_cli.data.coco import locate_dataset, read_split
    from ddetr_cli.evaluate.metrics import evaluate_detections
    from ddetr_cli.evaluate.predictions import read_predictions

    paths = locate_dataset(data, split=split, images=images, annotations=annotations, purpose="eval")
    if output is not None:
        check_new_folder(output, overwrite=overwrite)
    ground_truth = read_split(paths, skip_bad=skip_bad_annotations, max_bad=max_bad)
    for sentence in ground_truth.repairs:
        console.say_warning(sentence)
    total = len(ground_truth.images)
    is_limited = limit is not None and limit < total
    console.say(f"data: {paths.annotations} ({f'the first {limit} of {total}' if is_limited else total} images)")
    complete = True
    if predictions:
        detections = read_predictions(predictions, ground_truth)
        if not len(detections):
            console.say_warning(f"{predictions[0]}: no detections (an empty list). The score is 0.")
        if is_limited:
            ground_truth = ground_truth.subset(ground_truth.images[:limit])
            detections = detections.of(ground_truth)
    else:
        if paths.images is None:
            raise UsageError(f"{paths.annotations}: its folder of images was not found. Give --images DIR.")
        if is_limited:
            ground_truth = ground_truth.subset(ground_truth.images[:limit])
        detections, complete = _detections_of_model(
            model,
            ground_truth,
            paths.images,
            preset=preset,
            image_size=image_size,
            precision=precision,
            preprocess=preprocess,
            batch_size=batch_size,
            device=device,
            map_missing=map_missing,
        )
    metrics = evaluate_detections(ground_truth, detections, evaluator=evaluator)
    if output is not None:
        _write(output, metrics, detections, per_class=per_class)
        console.say(f"written: {output / 'metrics.json'}, {output / 'detections.json'}")
    _print(metrics, per_class=per_class, sole_output=output is None)
    if not complete:
        raise typer.Exit(3)


def _detections_of_model(
    model: str,
    ground_truth: CocoAnnotations,
    images: Path,
    *,
    preset: str | None,
    image_size: int | None,
    precision: str,
    preprocess: Literal["original", "hf"],
    batch_size: int,
    device: str,
    map_missing: Literal["error", "drop"],
) -> tuple[DetectionTable, bool]:
    """The model's detections, and whether all of them were finite numbers."""
    from ddetr_cli.data.coco import check_images
    from ddetr_cli.evaluate.mapping import map_classes
    from ddetr_cli.evaluate.run import predict_images
    from ddetr_cli.evaluate.table import TableBuilder

    check_images(ground_truth, images)
    loaded, predictor = open_predictor(
        model,
        preset=preset,
        device=device,
        precision=precision,
        image_size=image_size,
        preprocess=preprocess,
        batch_size=batch_size,
    )
    mapping = map_classes(loaded.classes, ground_truth.categories)
    for line in mapping.describe():
        console.say(line)
    detections = TableBuilder(ground_truth)
    unmapped = non_finite = 0
    with console.Progress(len(ground_truth.images), unit="images", description="eval") as progress:
        for result in predict_images(
            predictor, ground_truth, images, mapping, batch_size=batch_size, map_missing=map_missing
        ):
            detections.extend(result.detections)
            unmapped += result.unmapped
            non_finite += result.non_finite
            progress.advance()
    if unmapped:
        console.say(f"{unmapped} detections of classes without a counterpart left out (--map-missing drop)")
    if non_finite:
        console.say_warning(f"{non_finite} detections were NaN or infinite and are left out; the model is damaged.")
    return detections.build(), not non_finite


def _write(output: Path, metrics: CocoMetrics, detections: DetectionTable, *, per_class: bool) -> None:
    from ddetr_cli.atomic import atomic_file, write_json

    with atomic_file(output / "detections.json") as file:
        file.writelines(detections.to_json_lines())
    write_json(output / "metrics.json", metrics.to_json(per_class=per_class))


def _print(metrics: CocoMetrics, *, per_class: bool, sole_output: bool) -> None:
    """The numbers on stdout: a drawn table on a terminal, aligned plain columns in a file or pipe."""
    import sys

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
    for name, (_, iou, size, limit) in DEFINITIONS.items():
        threshold = "0.50:0.95" if iou is None else f"{iou:.2f}"
        table.add_row(name, threshold, size, str(limit), _number(metrics.overall[name]))
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
