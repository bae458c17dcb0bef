"""What ``detect`` and ``eval`` share: the options that choose a model and how it computes, and the predictor of them.

Each option is one annotated type, so that both commands take it under one name, range and help text.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ddetr_cli.cli import console
from ddetr_cli.errors import DeviceError, UsageError
from ddetr_cli.presets import LARGEST_IMAGE_SIZE, SMALLEST_IMAGE_SIZE

if TYPE_CHECKING:
    from ddetr_cli.inference.predictor import Predictor
    from ddetr_cli.inference.tiles import Tiling
    from ddetr_cli.weights import LoadedModel

DEFAULT_MODEL = "r50"
MODEL_HELP = "Checkpoint file, training run, 'demo', preset or hub id."

_MOST_TOGETHER = 1024


def _batch_size(text: str) -> str:
    if text != "auto" and not (text.isdecimal() and 1 <= int(text[:9]) <= _MOST_TOGETHER):
        raise typer.BadParameter(f"{text!r} is neither a number from 1 to {_MOST_TOGETHER} nor auto.")
    return text


BatchSize = Annotated[
    str,
    typer.Option(
        "--batch-size",
        "-b",
        metavar="N|auto",
        callback=_batch_size,
        help="Images that share a run on a GPU, if of equal size (auto: by its free memory); on the CPU each runs "
        "alone in any case.",
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        min=SMALLEST_IMAGE_SIZE,
        max=LARGEST_IMAGE_SIZE,
        show_default="the checkpoint's",
        help="Short side in pixels of what the model sees; the long side is capped at 1333/800 of it.",
    ),
]
Nms = Annotated[
    float | None,
    typer.Option(
        "--nms",
        metavar="IOU",
        show_default="off",
        help="Of boxes of one class that overlap by more than this, as 0.7, keep the best: for models that find one "
        "object twice, as after a short training.",
    ),
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option("--precision", help="Arithmetic of the model; auto: bf16 on a CPU that is faster in it, else fp32."),
]
Preprocess = Annotated[
    Literal["original", "hf"],
    typer.Option(
        "--preprocess",
        help="Whose rule gives the size the model sees: the authors', or that of transformers, which in long "
        "pictures differs by up to 2 pixels.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", metavar="PRESET", help="Variant of the model, where its file cannot tell."),
]


# What the libraries of PyTorch map, with some to work in; below, they fail in ways nobody understands.
_LEAST_ADDRESS_SPACE = 4_000_000_000


def check_address_space() -> None:
    """Raise DeviceError where the process may not have the address space (ulimit -v) that PyTorch takes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_ADDRESS_SPACE:
        raise DeviceError(
            f"memory: limited to {soft / 1e9:.1f} GB of address space (ulimit -v), too little for PyTorch. "
            f"Raise it to {_LEAST_ADDRESS_SPACE / 1e9:.0f} GB or more."
        )


def check_model_options(model: str, *, device: str, preset: str | None, nms: float | None = None) -> None:
    """Raise UsageError for values that cannot mean anything, before anything heavy is imported."""
    check_address_space()
    if not model:
        raise UsageError("--model: empty. Give a file, 'demo', a preset or a hub id.")
    from ddetr_cli.inference.device import check_device_name

    check_device_name(device)
    if preset is not None:
        from ddetr_cli.presets import get_preset

        get_preset(preset)
    if nms is not None:
        from ddetr_cli.inference.suppression import check_nms

        check_nms(nms)


def open_predictor(
    model: str,
    *,
    preset: str | None,
    device: str,
    precision: str,
    image_size: int | None,
    preprocess: Literal["original", "hf"],
    batch_size: str,
    tiles: Tiling | None = None,
    quiet: bool = False,
) -> tuple[LoadedModel, Predictor]:
    """The model and its predictor on the device; tells on stderr what was loaded and how it will compute."""
    from ddetr_cli.inference.device import resolve_device
    from ddetr_cli.inference.predictor import Predictor
    from ddetr_cli.inference.threads import use_available_cores
    from ddetr_cli.weights import load_model

    use_available_cores()
    # First, because it takes an instant to refuse a device and minutes to download a model.
    resolved = resolve_device(device, on_notice=console.say_warning)
    loaded = load_model(model, preset=preset, announce=None if quiet else console.say)
    report = loaded.report
    for note in report.notes:
        console.say_warning(note)
    predictor = Predictor(
        loaded,
        device=resolved,
        precision=precision,
        image_size=image_size,
        preprocess=preprocess,
        tiles=tiles,
        batch_size="auto" if batch_size == "auto" else int(batch_size),
        on_notice=console.say_warning,
    )
    if not quiet:
        console.say(
            f"model: {loaded.source} ({loaded.config.preset}, {len(loaded.classes)} classes): "
            f"{report.loaded} tensors loaded, {len(report.missing)} missing, {len(report.left_over)} left over; "
            f"{predictor.device}, {predictor.precision}, short side {predictor.image_size}"
            + ("" if predictor.device.type == "cpu" else f", up to {predictor.batch_size} together")
        )
    return loaded, predictor
