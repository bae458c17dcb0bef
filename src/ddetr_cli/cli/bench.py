"""``ddetr bench``: what models, the op and whole folders cost on this machine, alone and beside their rivals."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import typer

from ddetr_cli.cli import console
from ddetr_cli.cli.timed import DetectFinisher, DetectFolder, EvalScores, TrainSteps
from ddetr_cli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ddetr_cli.bench.run import BenchReport
    from ddetr_cli.bench.tables import Table


def bench(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            "-m",
            metavar="MODELS",
            show_default="r50, or as --card and --scaling say",
            help="Presets (random weights, nothing is downloaded), demo, checkpoints or hub ids, with commas between "
            "or the option repeated.",
        ),
    ] = None,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="Measure parameters and FLOPs, beside the published ones.")
    ] = False,
    op: Annotated[
        bool,
        typer.Option(
            "--op",
            help="Measure the deformable attention op of r50: every kernel, direction and shape; --precision chooses "
            "the dtypes of values, auto is all.",
        ),
    ] = False,
    stages: Annotated[
        bool,
        typer.Option(
            "--stages", help="Measure every stage of one picture, and the model against this machine's peak."
        ),
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", metavar="DIR", help="Measure a detect run over these pictures, against the model alone."
        ),
    ] = None,
    rivals: Annotated[
        bool,
        typer.Option(
            "--rivals",
            help="Measure transformers, ONNX Runtime and OpenVINO beside ours, as far as they are installed "
            "(pip install 'ddetr-cli[rivals]').",
        ),
    ] = False,
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Measure the model card's table, all eight systems unless --models names others: what is published "
            "of them beside what this machine does. With --val2017, also AP of those that are checkpoints.",
        ),
    ] = False,
    scaling: Annotated[
        bool,
        typer.Option(
            "--scaling",
            help="Measure how the time grows with the picture's area, the queries and the levels; of r50, detr-r50 "
            "and detr-r50-dc5 unless --models names others.",
        ),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare", metavar="A B", help="Measure nothing: show two files of --json side by side, B against A."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Also draw --card or --scaling to this picture (.png, .svg; needs pip install 'ddetr-cli[plots]').",
        ),
    ] = None,
    train: Annotated[
        bool,
        typer.Option(
            "--train", help="Measure a training step, beside transformers' with the same loss if installed."
        ),
    ] = False,
    val2017: Annotated[
        Path | None,
        typer.Option(
            "--val2017",
            metavar="PATH",
            help="COCO's folder or annotation file: FLOPs also as the mean over its first 100 pictures, as "
            "published.",
        ),
    ] = None,
    image_size: Annotated[
        str,
        typer.Option(
            "--image-size",
            metavar="N|HxW",
            help="What the model sees: HxW in pixels, or the short side of a 4:3 picture; of a --folder, the short "
            "side.",
        ),
    ] = "800",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=1024, help="Pictures per run.")] = 1,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="LIST",
            help="Arithmetic of the models: auto, fp32, bf16, fp16, or several with commas between.",
        ),
    ] = "auto",
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, max=100_000, help="Timed runs of each candidate, taken in turns.")
    ] = 10,
    warmup: Annotated[int, typer.Option("--warmup", min=1, max=1000, help="Untimed runs of each before.")] = 2,
    allocator: Annotated[
        Literal["default", "tuned"] | None,
        typer.Option(
            "--allocator",
            show_default="as the environment says",
            help="Start again with the C library's default allocator, or with the settings that make fresh memory "
            "cheap for everyone.",
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write the tables in Markdown, for a README or an issue.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write everything measured to this file.")
    ] = None,
) -> None:
    """Measure models on this machine: parameters, FLOPs, latency and images per second.

    With --sizes, --op, --stages, --folder, --rivals or --train these are measured instead; several can be given. The
    tables go to stdout. Candidates take turns in rounds, so that a slow minute of the machine hits all alike; a ratio
    is the median of the rounds' ratios, with its quartiles, and what was too noisy to conclude from is said.

    Timed is a batch from normalised pixels to detections on the CPU, on random weights the same as on trained ones.
    One multiply-add counts as one FLOP.

    A ratio to another program depends on the allocator: run once with --allocator default and once with tuned.
    """
    if compare is not None:
        _compare(compare, json_file, as_markdown=markdown)
        return
    from ddetr_cli.bench import options as what
    from ddetr_cli.inference.device import check_device_name

    chosen = {what.SIZES: sizes, what.OP: op, what.STAGES: stages, what.FOLDER: folder is not None,
              what.CARD: card, what.SCALING: scaling, what.RIVALS: rivals, what.TRAIN: train}  # fmt: skip
    if plot is not None:
        _check_plot(plot, [name for name in (what.CARD, what.SCALING) if chosen[name]])
    if models is None:
        models = list(what.CARD_MODELS if card else what.SCALING_MODELS if scaling else ["r50"])
    options = what.BenchOptions(
        models=what.split_names(models, "--models", "r50,tiny"),
        size_hw=what.parse_size(image_size),
        batch_size=batch_size,
        precisions=what.parse_precisions(precision),
        device=check_device_name(device),
        rounds=rounds,
        warmup=warmup,
        measurements=tuple(name for name, is_chosen in chosen.items() if is_chosen) or (what.SIZES, what.LATENCY),
        val2017=val2017,
    )
    if val2017 is not None and {what.SIZES, what.CARD}.isdisjoint(options.measurements):
        raise UsageError("--val2017: FLOPs are averaged over it, and the card scores on it. Add --sizes or --card.")
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        # Known now; minutes of measuring later it would be a pity.
        raise OutputError(f"{json_file}: cannot be written (no such folder, or it is one). Choose another file.")
    run_folder = None if folder is None else DetectFolder(folder)
    # An annotation file alone has no pictures to score on.
    score = EvalScores(val2017) if card and val2017 is not None and val2017.is_dir() else None
    if allocator is not None:
        from ddetr_cli.bench.allocator import environment_for, start_again

        environment = environment_for(allocator)
        if environment is not None:
            start_again(environment)

    from ddetr_cli.bench.run import run_bench
    from ddetr_cli.inference.threads import use_available_cores

    use_available_cores()
    with _Talk() as talk:
        report = run_bench(
            options,
            listener=talk,
            finishing=DetectFinisher,
            run_folder=run_folder,
            score=score,
            training=TrainSteps(),
        )
    console.write_result(_text(report, as_markdown=markdown), sole_output=json_file is None)
    if json_file is not None:
        from ddetr_cli.atomic import write_json

        write_json(json_file, report.to_json())
    if plot is not None:
        from ddetr_cli.bench.plots import plot_sections

        plot_sections(report.sections, plot)
        console.say(f"drawn: {plot}")


def _check_plot(plot: Path, drawn: list[str]) -> None:
    """Raise UsageError or OutputError for what could not be drawn in the end."""
    if len(drawn) != 1:
        raise UsageError("--plot: draws one measurement. Add either --card or --scaling.")
    if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {plot}: not a kind of picture that can be drawn. Name it .png, .svg or .pdf.")
    if plot.is_dir() or not plot.absolute().parent.is_dir():
        raise OutputError(f"{plot}: cannot be written (no such folder, or it is one). Choose another file.")
    from ddetr_cli.plots import check_plots

    check_plots("--plot")


def _compare(reports: tuple[Path, Path], json_file: Path | None, *, as_markdown: bool) -> None:
    from ddetr_cli.bench.comparison import compare_reports

    comparison = compare_reports(*reports)
    text = _table_text(comparison.table(), as_markdown=as_markdown)
    console.write_result(text, sole_output=json_file is None)
    if json_file is not None:
        from ddetr_cli.atomic import write_json

        write_json(json_file, comparison.to_json())


class _Talk:
    """What a measurement says while it runs, on stderr."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._progress: console.Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def expect(self, runs: int) -> None:
        self._stack.close()
        self._progress = self._stack.enter_context(console.Progress(runs, unit="runs", description="bench"))

    def ran(self) -> None:
        if self._progress is not None:
            self._progress.advance()

    def notice(self, text: str) -> None:
        (console.say if self._progress is None else self._progress.say)(text)


def _text(report: BenchReport, *, as_markdown: bool) -> str:
    from ddetr_cli.bench.allocator import describe

    options, machine = report.options, report.machine
    height, width = options.size_hw
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    lines = [
        f"{height}x{width} px (height x width), batch {options.batch_size}, {options.rounds} rounds in turns",
        f"on {machine['device']}: {where}; allocator {describe(machine['allocator'])}",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        str(report.kernels),
    ]
    if as_markdown:
        lines = [f"- {line}" for line in lines]
    return "\n".join([*lines, "", *(_table_text(table, as_markdown=as_markdown) for table in report.tables())])


def _table_text(table: Table, *, as_markdown: bool) -> str:
    if as_markdown:
        return table.markdown()
    drawn = _drawn(table, table.headings)
    if max(map(len, drawn.splitlines())) > console.RESULT_WIDTH:
        columns = zip(table.headings, *table.rows, strict=True)
        drawn = _drawn(table, [_folded(heading, cells) for heading, *cells in columns])
    return "\n".join([table.title, drawn, *table.notes, "", ""])


def _drawn(table: Table, headings: Sequence[str]) -> str:
    """The table as wide as it needs to be: a name or a figure that is folded cannot be read."""
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(box=box.SIMPLE, pad_edge=False)
    for number, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if number < table.labels else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    return "\n".join(line.rstrip() for line in console.render(drawn, width=10_000).rstrip().splitlines())


def _folded(heading: str, cells: Sequence[str]) -> str:
    """A heading in lines no wider than what stands below it, or than its longest word."""
    from textwrap import fill

    return fill(heading, max(map(len, (*heading.split(), *cells))), break_long_words=False)
