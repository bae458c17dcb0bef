"""``ddetr detect``: boxes in pictures, as files and as pictures one can look at."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from ddetr_cli.data.formats import MAX_PIXELS
from ddetr_cli.detect.selection import make_selection, parse_thresholds
from ddetr_cli.detect.sinks.formats import DRAWN, FORMATS, STREAMED
from ddetr_cli.errors import UsageError
from ddetr_cli.presets import FASTER_RCNN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.run import ImageResult, RunSummary, Sink
    from ddetr_cli.detect.selection import Selection
    from ddetr_cli.detect.sources import Inputs
    from ddetr_cli.inference.predictor import Predictor
    from ddetr_cli.weights import LoadedModel

_SHOWN_CLASSES = 20


def detect(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCES", help="Pictures, and folders searched for pictures.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)] = DEFAULT_MODEL,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the results; refused if it exists. '-' writes one of the formats "
            f"{', '.join(STREAMED)} to stdout.",
        ),
    ] = "ddetr-out",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the results of an earlier run in --output; touch nothing else."),
    ] = False,
    thresholds: Annotated[
        list[str] | None,
        typer.Option(
            "--threshold",
            "-t",
            metavar="[CLASS=]0..1",
            show_default="0.5",
            help="Keep detections scoring at least this; 0 keeps everything the model gives (100 per image at most). "
            "Again with CLASS=, by name or id: another one for that class.",
        ),
    ] = None,
    class_list: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="LIST",
            show_default="all",
            help="Keep only these: names or ids, separated by commas.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, show_default="all", help="Keep at most so many of a picture, the best."),
    ] = None,
    one_class_per_box: Annotated[
        bool,
        typer.Option(
            "--one-class-per-box",
            help="Where the model gives one box several classes, keep the best of them (before --classes).",
        ),
    ] = False,
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="LIST",
            help="What to write, separated by commas: "
            + "; ".join(f"{name} ({', '.join(files)})" for name, files in FORMATS.items())
            + ".",
        ),
    ] = "coco,images",
    device: Device = "auto",
    batch_size: BatchSize = 8,
    precision: Precision = "auto",
    image_size: ImageSize = None,
    preprocess: Preprocess = "original",
    tiles: Annotated[
        int | None,
        typer.Option(
            "--tiles",
            min=32,
            metavar="PX",
            show_default="off",
            help="Look at larger pictures in overlapping tiles of this size as well, for small objects. As large as "
            "--image-size: at their own resolution.",
        ),
    ] = None,
    tile_overlap: Annotated[
        float,
        typer.Option(
            "--tile-overlap", min=0, max=0.9, help="What neighbours share, of a tile; larger than the small objects."
        ),
    ] = 0.25,
    draft: Annotated[
        bool,
        typer.Option(
            "--draft",
            help="Decode large JPEGs at a reduced size, still above what the model sees: faster, and results "
            "differ a little. Without annotated pictures only.",
        ),
    ] = False,
    preset: Preset = None,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", min=1, help="Refuse pictures of more pixels than this.")
    ] = MAX_PIXELS,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and warnings.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also the kernels in use, the model's tensors and every image.")
    ] = False,
) -> None:
    """Find objects in pictures and write them as COCO results and as annotated pictures.

    In --output: detections.json, the boxes as a COCO results list; images.json, the images and categories they refer
    to; annotated/, the pictures with their boxes. --format chooses other results, any of them together.

    A picture that cannot be read is named and passed over, and the exit code is 3.
    """
    if quiet and verbose:
        raise UsageError("--quiet and --verbose: contradict each other. Give one.")
    wanted = _parse_formats(formats)
    threshold, by_class = parse_thresholds(thresholds or (), default=0.5)
    names = None if class_list is None else [name.strip() for name in class_list.split(",") if name.strip()]
    if names == []:
        raise UsageError("--classes: empty. Give names or ids, or leave it out.")
    if draft and not wanted.isdisjoint(DRAWN):
        raise UsageError("--draft: not with annotated pictures or crops (they need every pixel). Add --format coco.")
    if draft and tiles is not None:
        raise UsageError("--draft: not with --tiles (they need every pixel). Leave one out.")
    if not output:
        raise UsageError("--output: empty. Give a folder.")
    to_stdout = output == "-"
    if to_stdout and (len(wanted) != 1 or wanted.isdisjoint(STREAMED)):
        raise UsageError(
            f"--output -: takes one format of {', '.join(STREAMED)} (not {formats}). Add --format {STREAMED[1]}."
        )
    check_model_options(model, device=device, preset=preset)

    from ddetr_cli.detect.sources import find_inputs

    folder = Path(output)
    inputs = find_inputs(sources, output=None if to_stdout else folder)
    if not to_stdout:
        from ddetr_cli.detect.sinks.output import prepare_output

        prepare_output(folder, inputs.images, overwrite=overwrite, formats=wanted)

    from ddetr_cli.detect.run import detect_images
    from ddetr_cli.detect.sinks.assemble import make_sinks, make_stream_sink
    from ddetr_cli.inference.tiles import Tiling

    loaded, predictor = open_predictor(
        model,
        preset=preset,
        device=device,
        precision=precision,
        image_size=image_size,
        preprocess=preprocess,
        batch_size=batch_size,
        tiles=None if tiles is None else Tiling(tiles, tile_overlap),
        quiet=quiet,
    )
    selection = make_selection(
        loaded.classes, threshold, by_class, names, top=top_k, one_class_per_box=one_class_per_box
    )
    if draft and loaded.config.family == FASTER_RCNN:
        raise UsageError("--draft: not for Faster R-CNN (it resizes without smoothing). Leave it out.")
    if verbose:
        _say_details(loaded, inputs)

    sinks: list[Sink]
    if to_stdout:
        sinks = [make_stream_sink(console.StdoutFile(), min(wanted), loaded.classes)]
    else:
        info = _info(loaded, predictor, selection, draft=draft)
        sinks = make_sinks(folder, wanted, loaded.classes, info, max_pixels=max_pixels)
    with (
        console.StopSignals() as stop,
        console.Progress(len(inputs.images), unit="images", description="detect", quiet=quiet) as progress,
        _notes_of_the_reader(progress, verbose=verbose),
    ):

        def report(result: ImageResult) -> None:
            if result.failure is not None:
                progress.say(f"ddetr: error: {result.input.path}: {result.failure}")
            elif result.dropped:
                progress.say(
                    f"ddetr: error: {result.input.path}: {result.dropped} detections dropped (not finite numbers). "
                    "Use --precision fp32, or check the model."
                )
            if verbose and result.failure is None:
                progress.say(_line(result, loaded.classes))
            progress.advance()

        summary = detect_images(
            inputs.images,
            predictor,
            sinks,
            selection=selection,
            max_pixels=max_pixels,
            draft=draft,
            on_result=report,
            should_stop=lambda: stop.requested,
        )
    if not quiet:
        _show_summary(summary, loaded.classes, selection)
    if not quiet or summary.failed:
        tail = f", not reached {summary.unfinished}" if summary.unfinished else ""
        console.say(f"processed {summary.processed}, failed {summary.failed}, skipped {len(inputs.skipped)}{tail}")
    if not quiet and not to_stdout:
        console.say(f"results in {folder}")
    # A signal that came when the last image was done stopped nothing.
    code = stop.exit_code if summary.unfinished else _exit_code(summary)
    if code:
        raise typer.Exit(code)


def _exit_code(summary: RunSummary) -> int:
    if summary.processed == 0:
        return 4
    return 3 if summary.failed or summary.dropped else 0


def _parse_formats(text: str) -> frozenset[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise UsageError(f"--format {text!r}: unknown. Choose any of {', '.join(FORMATS)}.")
    return frozenset(names)


def _info(loaded: LoadedModel, predictor: Predictor, selection: Selection, *, draft: bool) -> dict[str, object]:
    """``info`` of images.json: what made these results. No date, so that equal runs give equal files."""
    from ddetr_cli import __version__

    tiling = predictor.prepare.tiles
    return {
        "description": "ddetr detect",
        "version": __version__,
        "model": str(loaded.source),
        "model_sha256": loaded.sha256,
        "preset": loaded.config.preset,
        "image_size": predictor.image_size,
        "preprocess": predictor.prepare.preprocess,
        "tiles": None if tiling is None else [tiling.size, tiling.overlap],
        "draft": draft,
        "precision": predictor.precision,
        **selection.to_json(loaded.classes),
    }


def _say_details(loaded: LoadedModel, inputs: Inputs) -> None:
    from ddetr_cli.ops import kernel_status

    for line in (*loaded.report.table(), *str(kernel_status()).splitlines()):
        console.say(line)
    for path, reason in inputs.skipped:
        console.say(f"{path}: skipped ({reason})")


def _line(result: ImageResult, classes: ClassTable) -> str:
    """One line on one finished image, for -v."""
    counts: dict[str, int] = {}
    for label in result.labels:
        counts[classes.name(label)] = counts.get(classes.name(label), 0) + 1
    found = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    width, height = result.size_wh or (0, 0)
    return f"{result.input.path}: {width}x{height}, {found or 'nothing'}, {result.seconds:.2f} s"


def _show_summary(summary: RunSummary, classes: ClassTable, selection: Selection) -> None:
    from rich.table import Table
    from rich.text import Text

    from ddetr_cli.detect.run import class_counts
    from ddetr_cli.printable import printable

    images = f"{summary.processed} image{'' if summary.processed == 1 else 's'}"
    pace = f", {summary.seconds / summary.processed:.2f} s each" if summary.processed else ""
    table = Table()
    own = "".join(f", {printable(classes.name(i))} {value:g}" for i, value in sorted(selection.thresholds.items()))
    table.add_column(Text(f"class (score >= {selection.threshold:g}{own})"))
    table.add_column("count", justify="right")
    counts = class_counts(summary, classes)
    for name, count in counts[:_SHOWN_CLASSES]:
        table.add_row(Text(printable(name)), str(count))
    if len(counts) > _SHOWN_CLASSES:
        rest = counts[_SHOWN_CLASSES:]
        table.add_row(f"{len(rest)} more classes", str(sum(count for _, count in rest)))
    if not counts:
        table.add_row("nothing found", "0")
    console.say(f"{summary.detections} detections in {images}, {summary.seconds:.1f} s{pace}")
    console.show(table)


@contextmanager
def _notes_of_the_reader(progress: console.Progress, *, verbose: bool) -> Iterator[None]:
    """With -v, what the library notes about single files (several frames, damaged EXIF) appears on stderr."""
    if not verbose:
        yield
        return

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.INFO:
                progress.say(f"ddetr: note: {record.getMessage()}")

    logger, handler = logging.getLogger("ddetr_cli"), Handler(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
