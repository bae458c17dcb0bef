"""``ddetr train``: a model for your own classes, from a data set in COCO format."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import typer

from ddetr_cli.cli import console
from ddetr_cli.errors import UsageError
from ddetr_cli.presets import PRESETS


def train(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Data set in COCO format: a COCO root, or a folder with images/ and annotations/train.json "
            "(and val.json). Not needed with --images and --annotations.",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="RUN", help="Folder for checkpoints, metrics and the configuration."),
    ] = Path("ddetr-run"),
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "-p",
            show_default="r50",
            help=f"Variant to train: {', '.join(PRESETS)}. With --init: what that file holds, where it cannot tell.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option("--init", metavar="WEIGHTS", help="Start from this model: file, run, preset name or hub id."),
    ] = None,
    backbone_weights: Annotated[
        str | None,
        typer.Option(
            "--backbone-weights",
            metavar="FILE|none",
            show_default="torchvision's IMAGENET1K_V1",
            help="What the trunk of an r50 preset starts from.",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, show_default="r50: 50, tiny: 100", help="Passes over the images.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, show_default="r50: 2, tiny: 8", help="Images per step.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            min=32,
            max=8192,
            show_default="the preset's",
            help="Short side in pixels the model sees.",
        ),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(
            "--queries", min=1, max=100_000, show_default="the preset's", help="Objects it can find in an image."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            show_default="the recipe's, scaled to the batch",
            help="Rate of the transformer; the trunk's keeps its ratio to it.",
        ),
    ] = None,
    augment: Annotated[
        Literal["paper", "jitter", "top-down"] | None,
        typer.Option(
            "--augment",
            show_default="r50: paper, tiny: jitter",
            help="paper: the authors' flips, sizes and crops. jitter: large changes of scale, and colours. "
            "top-down: jitter plus vertical flips and quarter turns, for pictures without an up.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", show_default="train2017 or train", help="Annotation file of DATA.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Folder of the images, instead of DATA's own.")
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option("--annotations", metavar="FILE", help="Annotation file, instead of one found in DATA."),
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option("--precision", help="bf16: autocast over fp32 weights.")
    ] = "fp32",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=0, show_default="cpu: 0, cuda: 8", help="Processes that read and augment images."
        ),
    ] = None,
    eval_every: Annotated[
        int, typer.Option("--eval-every", min=1, help="Epochs between validations; the last is always validated.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Start of every random choice.")] = 42,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Go on with this run after its last finished epoch. Its config.json holds all options but "
            "--device, --workers and --quiet.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a RUN that exists.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")] = False,
) -> None:
    """Train a detector on your own classes, and validate it after every epoch.

    RUN/best.safetensors is the model with the best validation AP; --model RUN takes it everywhere. Without a val
    split every tenth training image is held out. A test split is never touched.
    """
    if preset is not None and preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r}: unknown. Choose one of {', '.join(PRESETS)}.", param_hint="--preset")
    if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
        raise typer.BadParameter(f"{learning_rate}: not a positive number.", param_hint="--learning-rate")
    if resume is None and data is None and (images is None or annotations is None):
        raise UsageError("DATA: missing. Give a data set folder, or --images DIR and --annotations FILE.")

    if init is not None and backbone_weights is not None:
        raise UsageError("--backbone-weights: of no use with --init, which brings the trunk too. Leave one out.")

    from ddetr_cli.inference.device import check_device_name
    from ddetr_cli.train.options import TrainOptions, resumed_options

    check_device_name(device)

    options = TrainOptions(
        output=output,
        data=data,
        split=split,
        images=images,
        annotations=annotations,
        preset=preset,
        init=init,
        backbone_weights=backbone_weights,
        queries=queries,
        image_size=image_size,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        augmentation=augment,
        precision=precision,
        eval_every=eval_every,
        seed=seed,
        device=device,
        workers=workers,
        overwrite=overwrite,
    )
    if resume is not None:
        # Everything else at its default, --output included: it is the folder that is resumed.
        if options != TrainOptions(output=Path("ddetr-run"), device=device, workers=workers):
            raise UsageError(
                "--resume: takes its options from RUN/config.json. Leave out all but --device, --workers and --quiet."
            )
        options = resumed_options(resume, device=device, workers=workers)

    from ddetr_cli.train.run import run_training

    with _TerminalProgress(quiet=quiet) as progress:
        result = run_training(options, progress)
    if not quiet:
        ap = "n/a" if result.best_ap is None else f"{result.best_ap:.4f}"
        console.say(f"best validation AP {ap} (epoch {result.best_epoch}): {result.best}")


class _TerminalProgress:
    """A bar for each epoch on a terminal, one line for each epoch everywhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: console.Progress | None = None
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def note(self, text: str) -> None:
        """One line, not said when quiet."""
        if not self._quiet:
            console.say(text)

    def warn(self, text: str) -> None:
        """One line, said in any case."""
        console.say_warning(text)

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """Advance the epoch's bar."""
        if step == 1:
            self._bar = console.Progress(steps, unit="steps", description=f"epoch {epoch}", quiet=self._quiet)
            self._bar.__enter__()
        if self._bar is not None:
            self._bar.advance()
        if step == steps:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None

    def epoch(self, row: dict[str, Any]) -> None:
        """One line with the epoch's loss and validation numbers."""
        if self._quiet:
            return
        parts = [
            f"epoch {row['epoch']}",
            f"loss {row.get('loss', math.nan):.3f}",
            f"{row['images_per_second']:.1f} images/s",
        ]
        if row["skipped_steps"]:
            parts.append(f"{row['skipped_steps']} steps skipped (loss not finite)")
        if "val" in row:
            parts += [
                f"{name} {'n/a' if row['val'][name] is None else format(row['val'][name], '.3f')}"
                for name in ("AP", "AP50", "APs", "APm", "APl")
            ]
        minutes = (time.monotonic() - self._start) / 60
        console.say(", ".join([*parts, f"{minutes:.1f} min"]))
