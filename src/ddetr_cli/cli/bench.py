"""``ddetr bench``: what models cost on this machine, in parameters, FLOPs and time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ddetr_cli.cli import console
from ddetr_cli.errors import OutputError

if TYPE_CHECKING:
    from ddetr_cli.bench.run import BenchReport


def bench(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            "-m",
            metavar="MODELS",
            show_default="r50",
            help="Presets (random weights, nothing is downloaded), demo, checkpoints or hub ids, with commas between "
            "or the option repeated.",
        ),
    ] = None,
    image_size: Annotated[
        str,
        typer.Option("--image-size", metavar="N|HxW", help="HxW in pixels, or the short side of a 4:3 picture."),
    ] = "800",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=1024, help="Pictures per run.")] = 1,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option("--precision", help="Arithmetic of the model; auto is fp32."),
    ] = "auto",
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, max=100_000, help="Timed runs of each model, taken in turns.")
    ] = 10,
    warmup: Annotated[int, typer.Option("--warmup", min=1, max=1000, help="Untimed runs of each model before.")] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write everything measured to this file.")
    ] = None,
) -> None:
    """Measure models: parameters, FLOPs, latency and images per second.

    The table goes to stdout. Timed is one batch from normalised pixels to scored boxes; reading and drawing pictures
    is not. One multiply-add counts as one FLOP.
    """
    from ddetr_cli.bench.options import BenchOptions, parse_size, split_models
    from ddetr_cli.inference.device import check_device_name

    options = BenchOptions(
        models=split_models(models if models is not None else ["r50"]),
        size_hw=parse_size(image_size),
        batch_size=batch_size,
        precision="fp32" if precision == "auto" else precision,
        device=check_device_name(device),
        rounds=rounds,
        warmup=warmup,
    )
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        # Known now; minutes of measuring later it would be a pity.
        raise OutputError(f"{json_file}: cannot be written (no such folder, or it is one). Choose another file.")

    from ddetr_cli.bench.run import run_bench

    runs = len(options.models) * (options.warmup + options.rounds)
    with console.Progress(runs, unit="runs", description="bench") as progress:
        report = run_bench(options, on_run=progress.advance, on_notice=progress.say)
    console.write_result(_text(report), sole_output=json_file is None)
    if json_file is not None:
        from ddetr_cli.atomic import write_json

        write_json(json_file, report.to_json())


def _text(report: BenchReport) -> str:
    from rich import box
    from rich.table import Table

    from ddetr_cli.bench.run import RANDOM_WEIGHTS

    options = report.options
    height, width = options.size_hw
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("model", "weights"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for heading in ("params M", "trained M", "GFLOPs", "median ms", "p90 ms", "min ms", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in report.models:
        table.add_row(
            model.name,
            RANDOM_WEIGHTS if model.weights == RANDOM_WEIGHTS else "loaded",
            f"{model.size.parameters / 1e6:.2f}",
            f"{model.size.trainable_parameters / 1e6:.2f}",
            f"{model.size.flops / 1e9:.1f}",
            f"{model.latency.median * 1e3:.1f}",
            f"{model.latency.p90 * 1e3:.1f}",
            f"{model.latency.fastest * 1e3:.1f}",
            f"{model.images_per_second(options.batch_size):.2f}",
        )
    machine, versions = report.machine, report.versions
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    lines = [
        (
            f"{height}x{width} px (height x width), batch {options.batch_size}, {options.precision}, "
            f"{options.rounds} rounds in turns after {options.warmup} warm-up runs"
        ),
        f"on {machine['device']}: {where}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        str(report.kernels),
        "GFLOPs of one picture, one multiply-add = 1; speed does not depend on the weights, presets have random ones",
    ]
    return "\n".join([*lines[:4], console.render(table).rstrip("\n"), lines[4], ""])
