"""``ddetr detect``: boxes in pictures, as files and as pictures one can look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddetr_cli.cli import console
from ddetr_cli.cli.detect_options import parse_formats, parse_shard, read_lists
from ddetr_cli.cli.detect_parts import merge_shards, open_processes
from ddetr_cli.cli.detect_report import Report, exit_code
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
from ddetr_cli.data.formats import MAX_PIXELS
from ddetr_cli.detect.patience import READ_TIMEOUT
from ddetr_cli.detect.selection import make_selection, parse_thresholds
from ddetr_cli.detect.sinks.formats import FORMATS, STREAMED
from ddetr_cli.errors import UsageError

if TYPE_CHECKING:
    from ddetr_cli.detect.results import Sink
    from ddetr_cli.detect.selection import Selection
    from ddetr_cli.inference.predictor import Predictor
    from ddetr_cli.weights import LoadedModel


def detect(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCES",
            show_default=False,
            help="Pictures, folders, patterns ('in/**/*.jpg'), .tar archives, videos, URLs; '-' reads a list of them "
            "from stdin.",
        ),
    ] = None,
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
    list_file: Annotated[
        str | None, typer.Option("--list", metavar="FILE", help="More sources, one a line; '-' is stdin.")
    ] = None,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Lists end each entry with a NUL, as find -print0 writes them.")
    ] = False,
    recursive: Annotated[
        bool, typer.Option("--recursive/--no-recursive", help="Search the folders within folders too.")
    ] = True,
    every: Annotated[int, typer.Option("--every", min=1, help="Of a video every so many frames one.")] = 1,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, show_default="all", help="Only the first so many pictures.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --output, if there is one: nothing finished is done again, what failed is.",
        ),
    ] = False,
    skip_failed: Annotated[
        bool,
        typer.Option(
            "--skip-failed", help="With --resume: leave what failed, and a picture that crashed the program."
        ),
    ] = False,
    shard: Annotated[
        str,
        typer.Option(
            "--shard", metavar="I/N", help="Only the I-th of N equal parts of the pictures, as for a job array."
        ),
    ] = "1/1",
    merge: Annotated[
        bool,
        typer.Option("--merge", help="SOURCES are the --output folders of all shards: make one --output of them."),
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
    nms: Nms = None,
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
    batch_size: BatchSize = "auto",
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
        bool | None,
        typer.Option(
            "--draft/--no-draft",
            help="Decode large JPEGs at half, a quarter or an eighth of their size, still well above what the model "
            "sees. It moves boxes by less than a pixel of the photograph, about as far as 16 bits do or twice that.",
            show_default="on, but with fp32 off",
        ),
    ] = None,
    preset: Preset = None,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", min=1, help="Refuse pictures of more pixels than this.")
    ] = MAX_PIXELS,
    allow_truncated: Annotated[
        bool,
        typer.Option(
            "--allow-truncated",
            help="Take files that break off as far as they go, and mark them; the rest of such a picture is made up.",
        ),
    ] = False,
    read_timeout: Annotated[
        int,
        typer.Option(
            "--read-timeout",
            min=0,
            max=86_400,
            metavar="SECONDS",
            help="Give a picture up that takes longer to read, as from a disk of the network that is gone; 0: never.",
        ),
    ] = READ_TIMEOUT,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, max=256, show_default="by device", help="Threads that read and draw beside the model."
        ),
    ] = None,
    max_failures: Annotated[
        int | None,
        typer.Option("--max-failures", min=0, show_default="any", help="Stop when more pictures than this failed."),
    ] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first picture that fails.")] = False,
    json_progress: Annotated[
        bool, typer.Option("--json-progress", help="Every line on stderr is a JSON object with an 'event'.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and warnings.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also the kernels in use, the model's tensors and every image.")
    ] = False,
) -> None:
    """Find objects in pictures and write them as COCO results and as annotated pictures.

    In --output: detections.json, the boxes as a COCO results list; images.json, the images and categories they refer
    to; annotated/, the pictures with their boxes; journal.jsonl and run.json, on the run itself. --format chooses
    other results, any of them together.

    A picture that cannot be read is named and passed over, and the exit code is 3.
    """
    if json_progress:
        console.talk_json()
    if fail_fast and max_failures:
        raise UsageError("--fail-fast and --max-failures: contradict each other. Give one.")
    most_failures = 0 if fail_fast else max_failures
    if quiet and verbose:
        raise UsageError("--quiet and --verbose: contradict each other. Give one.")
    wanted = parse_formats(formats)
    threshold, by_class = parse_thresholds(thresholds or (), default=0.5)
    names = None if class_list is None else [name.strip() for name in class_list.split(",") if name.strip()]
    if names == []:
        raise UsageError("--classes: empty. Give names or ids, or leave it out.")
    if not output:
        raise UsageError("--output: empty. Give a folder.")
    to_stdout = output == "-"
    if to_stdout and (len(wanted) != 1 or wanted.isdisjoint(STREAMED)):
        raise UsageError(
            f"--output -: takes one format of {', '.join(STREAMED)} (not {formats}). Add --format {STREAMED[1]}."
        )
    if resume and overwrite:
        raise UsageError("--resume and --overwrite: contradict each other. Give one.")
    if skip_failed and not resume:
        raise UsageError("--skip-failed: only with --resume.")
    if resume and to_stdout:
        raise UsageError("--resume: not with --output - (stdout keeps no journal). Give a folder.")
    part = parse_shard(shard)
    folder = None if to_stdout else Path(output)
    if merge:
        if folder is None or resume or part != (1, 1):
            raise UsageError("--merge: takes the folders of shards, --output and --overwrite, no more.")
        merge_shards([Path(source) for source in sources or ()], folder, overwrite=overwrite, quiet=quiet)
        return
    check_model_options(model, device=device, preset=preset, nms=nms)
    with open_processes(device) as processes:
        if processes.count > 1 and folder is None:
            raise UsageError("--output -: not with several processes. Give a folder.")
        quiet = quiet or not processes.is_main

        from ddetr_cli.detect.sources import find_inputs

        named, listed = read_lists(sources or [], list_file, null=null)
        if processes.count > 1 and "-" in (*(sources or ()), list_file):
            raise UsageError("source '-': not with several processes. Give --list a file.")
        inputs = find_inputs(named, output=folder, recursive=recursive, listed=listed, every=every, limit=limit)
        if folder is not None:
            processes.take_folder(folder, inputs.images, formats=wanted, overwrite=overwrite, resume=resume)

        from ddetr_cli.detect.journal import RunHeader
        from ddetr_cli.detect.run import detect_images
        from ddetr_cli.detect.sinks.assemble import make_sinks, make_stream_sink
        from ddetr_cli.detect.sinks.sheet import thumbnail_reader
        from ddetr_cli.inference.tiles import Tiling

        loaded, predictor = open_predictor(
            model,
            preset=preset,
            device=processes.device,
            precision=precision,
            image_size=image_size,
            preprocess=preprocess,
            batch_size=batch_size,
            tiles=None if tiles is None else Tiling(tiles, tile_overlap),
            quiet=quiet,
        )
        selection = make_selection(
            loaded.classes, threshold, by_class, names, top=top_k, one_class_per_box=one_class_per_box, nms=nms
        )
        report = Report(loaded.classes, inputs, quiet=quiet, verbose=verbose)
        if verbose:
            report.say_details(loaded)
        if draft and predictor.prepare.reducible_to is None:
            raise UsageError("--draft: not with --tiles, nor for Faster R-CNN (they need every pixel). Leave it out.")
        draft = predictor.tolerates_draft if draft is None else draft
        info = _info(loaded, predictor, selection, draft=draft)
        options = {name: value for name, value in info.items() if name not in ("description", "model")}
        options |= {"device": predictor.device.type, "max_pixels": max_pixels, "allow_truncated": allow_truncated}
        header = RunHeader.of(
            inputs.images, loaded.classes, info=info, options=options, formats=sorted(wanted), shard=part
        )

        stop = console.StopSignals()

        def should_stop() -> bool:
            return stop.requested or (most_failures is not None and report.failed > most_failures)

        thumbnails = thumbnail_reader(
            max_pixels=max_pixels,
            allow_truncated=allow_truncated,
            read_timeout=read_timeout,
            should_stop=should_stop,
        )
        positions = processes.stretch(header.positions)
        summary = journal = None
        try:
            if folder is None:
                sinks: list[Sink] = [make_stream_sink(console.StdoutFile(), min(wanted), loaded.classes)]
            else:
                journal = processes.open_journal(
                    folder, header, sources or [], resume=resume, skip_failed=skip_failed
                )
                # As the run began, so that a model that was moved since makes no difference.
                info = journal.finished.headers[0].info if journal.finished.headers else info
                sinks = processes.make_sinks(
                    lambda formats: make_sinks(folder, formats, loaded.classes, info, read=thumbnails), wanted
                )
            done = 0 if journal is None else sum(position in journal.finished for position in positions)
            if resume:
                report.say_resumed(done, len(positions))

            with stop, report.progress(len(positions) - done):
                summary = detect_images(
                    inputs.images,
                    predictor,
                    sinks,
                    selection=selection,
                    max_pixels=max_pixels,
                    draft=draft,
                    allow_truncated=allow_truncated,
                    read_timeout=read_timeout,
                    workers=workers,
                    positions=positions,
                    journal=journal,
                    on_result=report.add,
                    should_stop=should_stop,
                )
                if folder is not None and not stop.requested:
                    summary = processes.join(folder, header, inputs.images, summary)
        finally:
            processes.close(summary, skipped=len(inputs.skipped))
    report.end(summary, selection, folder)
    # A signal that came when the last image was done stopped nothing.
    code = stop.exit_code if summary.unfinished and stop.requested else exit_code(summary)
    if code and (processes.is_main or summary.unfinished):
        raise typer.Exit(code)


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
        "draft": draft and predictor.prepare.reducible_to is not None,
        "precision": predictor.precision,
        **selection.to_json(loaded.classes),
    }
