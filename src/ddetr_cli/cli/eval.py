"""``ddetr eval``: COCO's twelve numbers for a model on a data set, or for a results file."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ddetr_cli.cli import console
from ddetr_cli.cli.eval_compare import compare_runs, results_file, run_name
from ddetr_cli.cli.eval_tables import print_metrics
from ddetr_cli.cli.predictor import (
    DEFAULT_MODEL,
    MODEL_HELP,
    BatchSize,
    Device,
    ImageSize,
    Nms,
    Precision,
    Preprocess,
    Preset,
    check_model_options,
    open_predictor,
)
from ddetr_cli.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from ddetr_cli.data.coco import CocoAnnotations
    from ddetr_cli.evaluate.metrics import CocoMetrics
    from ddetr_cli.evaluate.table import DetectionTable


DATA, RESULTS = (partial(typer.Option, rich_help_panel=title) for title in ("Data", "Results"))

_MAY_BE_EMPTY = 0.1  # of the images with objects; more without any detection look like a run that was cut short


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
        RESULTS(
            "--predictions",
            metavar="FILE",
            help="Score this COCO results file, not a model. Give it again for each part of one result.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        DATA(
            "--split",
            show_default="val2017, val, valid or the only one",
            help="Which annotation file of DATA, by name.",
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        DATA(
            "--images",
            metavar="PATH",
            help="A folder: where the images are, instead of DATA's own. A text file: which of them to use, one name "
            "or id a line. Both can be given.",
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        DATA("--annotations", metavar="FILE", help="Annotation file, instead of one found in DATA."),
    ] = None,
    output: Annotated[
        Path | None,
        RESULTS(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for detections.json, metrics.json and the report; refused if it exists.",
        ),
    ] = None,
    evaluator: Annotated[
        Literal["fast", "pycocotools"],
        RESULTS("--evaluator", help="Who computes the numbers; both give the same, to the last bit."),
    ] = "fast",
    per_class: Annotated[bool, RESULTS("--per-class", help="Also show the numbers of every category.")] = False,
    nms: Nms = None,
    image_size: ImageSize = None,
    precision: Precision = "fp32",
    preprocess: Preprocess = "original",
    batch_size: BatchSize = "auto",
    preset: Preset = None,
    device: Device = "auto",
    map_missing: Annotated[
        Literal["error", "drop"],
        DATA("--map-missing", help="A predicted class the data set does not have: stop, or leave it out."),
    ] = "error",
    skip_bad_annotations: Annotated[
        bool, DATA("--skip-bad-annotations", help="Leave out annotations that are refused otherwise.")
    ] = False,
    max_bad: Annotated[
        float,
        DATA("--max-bad", min=0, max=1, help="The share of all that may be left out; more is refused."),
    ] = 0.05,
    limit: Annotated[int | None, DATA("--limit", min=1, help="Use only the first N images of the data set.")] = None,
    allow_partial: Annotated[
        bool, DATA("--allow-partial", help="Score results that leave out many of the images.")
    ] = False,
    bootstrap: Annotated[
        int | None,
        RESULTS(
            "--bootstrap",
            min=10,
            metavar="N",
            help="Add 95 % intervals of the numbers, from N data sets drawn from its images.",
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        RESULTS(
            "--compare",
            metavar="A B",
            help="Two results files, or --output folders of two runs, side by side: what changed from A to B.",
        ),
    ] = None,
    report: Annotated[
        bool,
        RESULTS("--report", help="Also write report.html, a page that needs no network, and plots/*.png."),
    ] = False,
    overwrite: Annotated[bool, RESULTS("--overwrite", help="Write into an existing --output.")] = False,
) -> None:
    """Score a model, or a results file, on a data set in COCO format: AP and AR as pycocotools computes them."""
    predictions = predictions or []
    if predictions and model is not None:
        raise UsageError(
            "--predictions and --model: contradict each other (a results file needs no model). Give one."
        )
    if report:
        from ddetr_cli.plots import check_plots

        if output is None:
            raise UsageError("--report: has no place to go. Give --output DIR.")
        check_plots("--report")
    if compare is not None:
        if predictions or model is not None:
            raise UsageError("--compare: takes the two runs to compare. Leave out --model and --predictions.")
        if nms is not None:
            raise UsageError("--nms: not with --compare (it takes results as they are). Score each with --nms first.")
        predictions = [results_file(path) for path in compare]
    for file in predictions:
        if not file.exists():
            raise UsageError(f"{file}: no such results file. Check the path.")
    if len(set(predictions)) < len(predictions) and compare is None:
        raise UsageError("--predictions: one file is given twice. Give each part once.")
    model = DEFAULT_MODEL if model is None else model
    check_model_options(model, device=device, preset=preset, nms=nms)

    is_main = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun one talks and writes
    if predictions and not is_main:
        return

    from ddetr_cli.atomic import check_new_folder
    from ddetr_cli.data.coco import locate_dataset, read_split
    from ddetr_cli.evaluate.accumulate import accumulate
    from ddetr_cli.evaluate.matching import match
    from ddetr_cli.evaluate.metrics import metrics_of
    from ddetr_cli.evaluate.predictions import read_predictions
    from ddetr_cli.evaluate.selection import listed_images

    folder, listing = _folder_and_list(images or [])
    paths = locate_dataset(data, split=split, images=folder, annotations=annotations, purpose="eval")
    if output is not None and is_main:
        check_new_folder(output, overwrite=overwrite)
    whole = read_split(paths, skip_bad=skip_bad_annotations, max_bad=max_bad)
    ground_truth = whole if listing is None else listed_images(listing, whole)
    ground_truth = ground_truth.subset(ground_truth.images[:limit]) if limit is not None else ground_truth
    if is_main:
        for sentence in ground_truth.repairs:
            console.say_warning(sentence)
        total, used = len(whole.images), len(ground_truth.images)
        which = f"{used} of {total} images" if used < total else f"{total} images"
        console.say(f"data: {paths.annotations} ({which})")
    complete = True
    if compare is not None:
        tables = []
        for file in predictions:
            tables.append(read_predictions([file], whole).of(ground_truth))
            _check_coverage(ground_truth, tables[-1], file, allow_partial=allow_partial)
        compare_runs(
            compare, (tables[0], tables[1]), ground_truth, paths.images,
            output=output, report=report, bootstrap=bootstrap, per_class=per_class,
        )  # fmt: skip
        return
    if predictions:
        detections = read_predictions(predictions, whole)
        detections = detections if ground_truth is whole else detections.of(ground_truth)
        _check_coverage(ground_truth, detections, predictions[0], allow_partial=allow_partial)
    else:
        if paths.images is None:
            raise UsageError(f"{paths.annotations}: its folder of images was not found. Give --images DIR.")
        found = _detections_of_model(
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
        if found is None:
            return
        detections, complete = found
    if nms is not None:
        count = len(detections)
        detections = detections.without_overlaps(nms)
        console.say(f"{count - len(detections)} of {count} detections overlap a better one and are left out (--nms)")
    matches = match(ground_truth, detections)
    if evaluator == "pycocotools":
        from ddetr_cli.evaluate.reference import pycocotools_curves

        curves = pycocotools_curves(ground_truth, detections)
    else:
        curves = accumulate(matches)
    metrics = metrics_of(ground_truth, len(detections), curves)
    if matches.past_limit:
        console.say(f"{matches.past_limit} detections past the 100 best of their image and class are not scored")
    if bootstrap is not None:
        from ddetr_cli.evaluate.bootstrap import intervals

        with console.Progress(bootstrap, unit="samples", description="bootstrap") as progress:
            metrics = replace(
                metrics, intervals=intervals(matches, metrics.images, bootstrap, on_sample=progress.advance)
            )
    if output is not None:
        _write(output, metrics, detections, per_class=per_class, nms=nms)
        written = [output / "metrics.json", output / "detections.json"]
        if report:
            from ddetr_cli.evaluate.report.evaluated import Evaluated
            from ddetr_cli.evaluate.report.report import write_report

            name = ", ".join(run_name(file) for file in predictions) or run_name(Path(model))
            run = Evaluated(name, ground_truth, paths.images, detections, matches, curves, metrics)
            written.append(write_report(run, output, datetime.now().astimezone()))
        console.say(f"written: {', '.join(map(str, written))}")
    print_metrics(metrics, per_class=per_class, sole_output=output is None)
    if not complete:
        raise typer.Exit(3)


def _folder_and_list(images: list[Path]) -> tuple[Path | None, Path | None]:
    """The folder and the text file among what --images named."""
    lists = [path for path in images if path.is_file()]
    folders = [path for path in images if not path.is_file()]
    if len(lists) > 1 or len(folders) > 1:
        raise UsageError("--images: given too often. Give one folder, one list of images, or one of each.")
    return (folders[0] if folders else None), (lists[0] if lists else None)


def _check_coverage(
    ground_truth: CocoAnnotations, detections: DetectionTable, path: Path, *, allow_partial: bool
) -> None:
    """Raise DatasetError for the results of a run that was cut short."""
    from ddetr_cli.errors import DatasetError

    if not len(detections):
        console.say_warning(f"{path}: no detections (an empty list). The score is 0.")
        return
    covered = {ground_truth.images[image].id for image in set(detections.image.tolist())}
    with_objects = {annotation.image_id for annotation in ground_truth.annotations}
    missing = len(with_objects - covered)
    if missing <= _MAY_BE_EMPTY * len(with_objects):
        return
    what = f"{path}: nothing was found in {missing} of the {len(with_objects)} images that hold objects"
    if not allow_partial:
        raise DatasetError(
            f"{what} (a run that was cut short?). Give all results, name the images with --images LIST, "
            "or pass --allow-partial."
        )
    console.say_warning(f"{what}; they count as missed (--allow-partial).")


def _detections_of_model(
    model: str,
    ground_truth: CocoAnnotations,
    images: Path,
    *,
    preset: str | None,
    image_size: int | None,
    precision: str,
    preprocess: Literal["original", "hf"],
    batch_size: str,
    device: str,
    map_missing: Literal["error", "drop"],
) -> tuple[DetectionTable, bool] | None:
    """The model's detections, and whether all of them were finite numbers; None but in torchrun's first process.

    Each of its processes takes every n-th image.
    """
    from ddetr_cli.data.coco import check_images
    from ddetr_cli.distributed import device_name, open_ranks
    from ddetr_cli.evaluate.mapping import map_classes
    from ddetr_cli.evaluate.run import predict_images
    from ddetr_cli.evaluate.table import TableBuilder, merged
    from ddetr_cli.inference.device import resolve_device

    device = device_name(device)
    with open_ranks(resolve_device(device)) as ranks:
        quiet = not ranks.is_main
        mine = ground_truth.subset(ground_truth.images[ranks.index :: ranks.count])
        check_images(mine, images)
        with ranks.main_first():  # it downloads what the others then find
            loaded, predictor = open_predictor(
                model,
                preset=preset,
                device=device,
                precision=precision,
                image_size=image_size,
                preprocess=preprocess,
                batch_size=batch_size,
                quiet=quiet,
            )
        mapping = map_classes(loaded.classes, ground_truth.categories, mismatch=CheckpointError)
        for line in [] if quiet else mapping.describe():
            console.say(line)
        builder = TableBuilder(ground_truth)
        unmapped = non_finite = 0
        with console.Progress(len(mine.images), unit="images", description="eval", quiet=quiet) as progress:
            for result in predict_images(
                predictor, mine, images, mapping, batch_size=predictor.batch_size, map_missing=map_missing
            ):
                builder.extend(result.detections)
                unmapped += result.unmapped
                non_finite += result.non_finite
                progress.advance()
        detections = builder.build()
        if ranks.count > 1:
            parts = ranks.gather(detections)
            unmapped, non_finite = (int(total) for total in ranks.total([unmapped, non_finite]))
            if quiet:
                return None
            detections = merged(ground_truth, parts)
    if unmapped:
        console.say(f"{unmapped} detections of classes without a counterpart left out (--map-missing drop)")
    if non_finite:
        console.say_warning(f"{non_finite} detections were NaN or infinite and are left out; the model is damaged.")
    return detections, not non_finite


def _write(
    output: Path, metrics: CocoMetrics, detections: DetectionTable, *, per_class: bool, nms: float | None
) -> None:
    from ddetr_cli.atomic import atomic_file, write_json

    with atomic_file(output / "detections.json") as file:
        file.writelines(detections.to_json_lines())
    options = {} if nms is None else {"nms": nms}
    write_json(output / "metrics.json", {**metrics.to_json(per_class=per_class), **options})
