"""``ddetr export``: a model written as Hugging Face's transformers, the authors' code or ddetr read it."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Annotated, Literal

import typer

from ddetr_cli.cli import console
from ddetr_cli.cli.predictor import MODEL_HELP, Preset
from ddetr_cli.errors import OutputError, UsageError


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    to: Annotated[
        Literal["huggingface", "authors", "ddetr"],
        typer.Option(
            "--to",
            help="huggingface: a folder with model.safetensors and config.json, for transformers. authors: the .pth "
            "of the authors' code, torchvision's for Faster R-CNN. ddetr: a checkpoint of our own, with a checksum.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="Folder (huggingface) or file to write.")
    ],
    preset: Preset = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there already under the same names.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")] = False,
) -> None:
    """Write a model in another layout; every number stays as it is.

    The paths of the files written go to stdout.
    """
    if not model:
        raise UsageError("MODEL: empty. Give a file, 'demo', a preset or a hub id.")
    if preset is not None:
        from ddetr_cli.presets import get_preset

        get_preset(preset)
    _check_output(output, is_folder=to == "huggingface", overwrite=overwrite)

    from ddetr_cli.weights import load_model
    from ddetr_cli.weights.export import export_model

    loaded = load_model(model, preset=preset, announce=None if quiet else console.say)
    for note in loaded.report.notes:
        console.say_warning(note)
    written = export_model(loaded, to, output)
    if not quiet:
        console.say(
            f"model: {loaded.source} ({loaded.config.preset}, {len(loaded.classes)} classes, {loaded.report.layout}) "
            f"written for {to}"
        )
    console.write_result("".join(f"{path}\n" for path in written), sole_output=False)


def _check_output(output: Path, *, is_folder: bool, overwrite: bool) -> None:
    """Refuse an output that cannot be, before the model is read."""
    from ddetr_cli.atomic import check_new_folder, check_writable

    if is_folder:
        check_new_folder(output, overwrite=overwrite)
        return
    try:
        kind = output.stat().st_mode
    except FileNotFoundError:
        kind = None
    except OSError as error:
        raise OutputError(
            f"{output}: not a place to write to ({error.strerror}). Choose another --output."
        ) from error
    if kind is not None and not stat.S_ISREG(kind):
        raise UsageError(f"{output}: not a regular file (this format is one file). Choose a file name.")
    if kind is not None and not overwrite:
        raise OutputError(f"{output}: exists already. Choose another --output, or pass --overwrite.")
    check_writable(output.parent)
