"""``ddetr train``: a model for your own classes, from a data set in COCO format."""

from __future__ import annotations

import math
import os
import shlex
import signal
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from ddetr_cli.cli import console
from ddetr_cli.cli.training import TrainingProgress
from ddetr_cli.errors import DatasetError, UsageError
from ddetr_cli.presets import PRESETS
from ddetr_cli.train.options import TRAINABLE, TrainOptions, check_trainable

# SIGUSR1 is what batch schedulers send some time before the end of a job.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Parameters that TrainOptions calls otherwise.
_FIELDS = {"augment": "augmentation"}

# An option in each section of the help page.
MODEL, RECIPE, DATA, RUN = (
    partial(typer.Option, rich_help_panel=title) for title in ("Model", "Recipe", "Data", "Run")
)


def train(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Data set in COCO's format (a COCO root, or a folder with images/ and annotations/train.json "
            "and val.json), in YOLO's (data.yaml) or Pascal VOC's (Annotations/*.xml). Not needed with --images and "
            "--annotations.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        MODEL(
            "--preset",
            "-p",
            show_default="r50",
            help=f"Variant to train: {', '.join(TRAINABLE)}. With --init: what that file holds, if it cannot tell.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        MODEL("--init", metavar="WEIGHTS", help="Start from this model: file, run, preset name or hub id."),
    ] = None,
    backbone_weights: Annotated[
        str | None,
        MODEL(
            "--backbone-weights",
            metavar="FILE|none",
            show_default="torchvision's IMAGENET1K_V1",
            help="What the trunk of an r50 preset starts from.",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        MODEL(
            "--image-size", min=32, max=8192, show_default="the preset's", help="Short side in pixels the model sees."
        ),
    ] = None,
    queries: Annotated[
        int | None,
        MODEL("--queries", min=1, max=100_000, show_default="the preset's", help="Objects it can find in an image."),
    ] = None,
    freeze: Annotated[
        Literal["none", "backbone", "encoder", "transformer"],
        MODEL(
            "--freeze", help="What keeps its weights: the trunk, that and the encoder, or all but heads and queries."
        ),
    ] = "none",
    epochs: Annotated[
        int | None,
        RECIPE(
            "--epochs",
            min=1,
            show_default="r50: 50, detr: 300, tiny: 100; --init: 25, tiny 40",
            help="Passes over the images.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        RECIPE(
            "--batch-size",
            min=1,
            show_default="r50: 2, tiny: 8",
            help="Images per step, those of all processes together.",
        ),
    ] = None,
    accumulate: Annotated[
        int,
        RECIPE(
            "--accumulate", min=1, metavar="N", help="Work through the images of a step in N passes, to save memory."
        ),
    ] = 1,
    learning_rate: Annotated[
        float | None,
        RECIPE(
            "--learning-rate",
            show_default="the recipe's, scaled to the batch",
            help="Rate of the transformer; the trunk's keeps its ratio to it.",
        ),
    ] = None,
    schedule: Annotated[
        Literal["step", "cosine"] | None,
        RECIPE("--schedule", show_default="r50: step; tiny, --init: cosine", help="How the rate falls."),
    ] = None,
    warmup: Annotated[
        int | None,
        RECIPE(
            "--warmup",
            min=0,
            metavar="STEPS",
            show_default="r50: 0; tiny, --init: 100",
            help="Steps in which the rate rises to its value.",
        ),
    ] = None,
    ema: Annotated[
        float | None,
        RECIPE(
            "--ema",
            min=0,
            max=0.99999,
            metavar="DECAY",
            show_default="r50: 0; tiny, --init: 0.997",
            help="Validate and keep weights averaged over steps; 0 for those of the last step.",
        ),
    ] = None,
    patience: Annotated[
        int,
        RECIPE("--patience", min=0, metavar="N", help="End after N validations without a better AP; 0 for never."),
    ] = 0,
    augment: Annotated[
        Literal["paper", "jitter", "top-down"] | None,
        RECIPE(
            "--augment",
            show_default="r50: paper, tiny: jitter",
            help="paper: the authors' flips, sizes and crops. jitter: large changes of scale, and colours. "
            "top-down: jitter plus vertical flips and quarter turns, for pictures without an up.",
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16"], RECIPE("--precision", help="bf16: autocast over fp32 weights.")
    ] = "fp32",
    checkpoint_activations: Annotated[
        bool,
        RECIPE(
            "--checkpoint-activations",
            help="Keep only what enters each layer and compute the rest again: less memory, same gradients, about a "
            "third more time.",
        ),
    ] = False,
    seed: Annotated[int, RECIPE("--seed", min=0, max=2**32 - 1, help="Start of every random choice.")] = 42,
    split: Annotated[
        str | None, DATA("--split", show_default="train2017 or train", help="Annotation file of DATA.")
    ] = None,
    images: Annotated[
        Path | None, DATA("--images", metavar="DIR", help="Folder of the images, instead of DATA's own.")
    ] = None,
    annotations: Annotated[
        Path | None, DATA("--annotations", metavar="FILE", help="Annotation file, instead of one found in DATA.")
    ] = None,
    check: Annotated[
        bool,
        DATA(
            "--check", help="Read the whole data set, say what is in it and what is wrong with it, and train nothing."
        ),
    ] = False,
    json_file: Annotated[
        Path | None, DATA("--json", metavar="FILE", help="With --check: also write the report here.")
    ] = None,
    cache: Annotated[
        bool,
        DATA(
            "--cache",
            help="Keep all decoded pictures in memory; says what they take, and refuses where it is not there. Of a "
            "small set the first GB is kept without it where no --workers read.",
        ),
    ] = False,
    skip_bad_annotations: Annotated[
        bool, DATA("--skip-bad-annotations", help="Leave out annotations that are refused otherwise.")
    ] = False,
    skip_missing: Annotated[
        bool, DATA("--skip-missing", help="Leave out images whose file is missing or cannot be read.")
    ] = False,
    max_bad: Annotated[
        float, DATA("--max-bad", min=0, max=1, help="The share of all that may be left out; more is refused.")
    ] = 0.05,
    output: Annotated[
        Path, RUN("--output", "-o", metavar="RUN", help="Folder for checkpoints, metrics and the configuration.")
    ] = Path("ddetr-run"),
    resume: Annotated[
        Path | None,
        RUN(
            "--resume",
            metavar="RUN",
            help="Go on with this run from its newest checkpoint, with the options it was started with. --device, "
            "--workers, --cache, --checkpoint-activations, --tensorboard, --keep and --save-every may be others.",
        ),
    ] = None,
    override: Annotated[
        bool, RUN("--override", help="With --resume: go on although options, data or processes are others now.")
    ] = False,
    overwrite: Annotated[bool, RUN("--overwrite", help="Start anew in a RUN that exists.")] = False,
    device: Annotated[str, RUN("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[
        int | None,
        RUN("--workers", min=0, show_default="cpu: 0, cuda: 8", help="Processes that read and augment images."),
    ] = None,
    eval_every: Annotated[
        int, RUN("--eval-every", min=1, help="Epochs between validations; the last is always validated.")
    ] = 1,
    save_every: Annotated[
        float,
        RUN("--save-every", min=0, metavar="MINUTES", help="Time between checkpoints; one more ends every epoch."),
    ] = 10.0,
    keep: Annotated[
        int, RUN("--keep", min=1, metavar="N", help="Checkpoints kept to go on from, besides the best model.")
    ] = 2,
    tensorboard: Annotated[
        bool,
        RUN("--tensorboard", help="Also write RUN/tensorboard (needs pip install 'ddetr-cli[tensorboard]')."),
    ] = False,
    quiet: Annotated[bool, RUN("--quiet", "-q", help="Only warnings and errors.")] = False,
) -> None:
    """Train a detector on your own classes, and validate it after every epoch.

    RUN/best.safetensors is the model with the best validation AP; --model RUN takes it everywhere. RUN/curves.png and
    RUN/pictures show how it goes. Without a val split every tenth training image is held out. A test split is never
    touched.
    """
    if preset is not None and preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r}: unknown. Choose one of {', '.join(TRAINABLE)}.", param_hint="--preset")
    if preset is not None:
        check_trainable(PRESETS[preset])
    if ema is not None and not 0 <= ema < 1:
        raise typer.BadParameter(f"{ema}: not in [0, 1).", param_hint="--ema")
    if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
        raise typer.BadParameter(f"{learning_rate}: not a positive number.", param_hint="--learning-rate")
    if resume is None and data is None and (images is None or annotations is None):
        raise UsageError("DATA: missing. Give a data set folder, or --images DIR and --annotations FILE.")

    if json_file is not None and not check:
        raise UsageError("--json: of use with --check only. Add it, or leave this out.")
    if check and resume is not None:
        raise UsageError("--check: of no use with --resume, which checks its data anyway. Leave one out.")
    if init is not None and backbone_weights is not None:
        raise UsageError("--backbone-weights: of no use with --init, which brings the trunk too. Leave one out.")

    from ddetr_cli.inference.device import check_device_name
    from ddetr_cli.train.options import resumed_options

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
        schedule=schedule,
        warmup=warmup,
        ema=ema,
        accumulate=accumulate,
        freeze=freeze,
        patience=patience,
        augmentation=augment,
        precision=precision,
        eval_every=eval_every,
        keep=keep,
        save_every=save_every,
        seed=seed,
        device=device,
        workers=workers,
        cache=cache,
        checkpoint_activations=checkpoint_activations,
        tensorboard=tensorboard,
        skip_bad_annotations=skip_bad_annotations,
        skip_missing=skip_missing,
        max_bad=max_bad,
        overwrite=overwrite,
    )
    if check:
        _check(options, json_file, quiet=quiet)
        return
    if resume is not None:
        if {"output", "overwrite"} & _given(context):
            raise UsageError("--resume: goes on in its own folder. Leave out --output and --overwrite.")
        given = {_FIELDS.get(name, name) for name in _given(context)} & set(vars(options)) - {"resume", "override"}
        options = resumed_options(resume, {name: getattr(options, name) for name in given}, override=override)
    elif override:
        raise UsageError("--override: of use with --resume only. Add it, or leave this out.")

    from ddetr_cli.detect.drawing import draw_detections
    from ddetr_cli.inference.threads import use_available_cores
    from ddetr_cli.train.run import run_training

    use_available_cores()
    quiet = quiet or os.environ.get("RANK", "0") != "0"  # of the processes of torchrun one talks
    # torchrun passes on a signal that all its processes may have got already: that is no second one.
    stop = console.StopSignals(STOP_SIGNALS, grace=5.0 if "RANK" in os.environ else 0.0)
    with TrainingProgress(quiet=quiet) as progress:
        result = run_training(options, progress, stop, draw_detections)
    if result.stopped:
        if os.environ.get("RANK", "0") == "0":
            console.say(f"saved. Go on with: ddetr train --resume {shlex.quote(str(options.output))}")
        raise typer.Exit(130 if stop.received == signal.SIGINT else 143)
    if not quiet:
        ap = "n/a" if result.best_ap is None else f"{result.best_ap:.4f}"
        console.say(f"best validation AP {ap} (epoch {result.best_epoch}): {result.best}")


def _given(context: typer.Context) -> set[str]:
    """The parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _check(options: TrainOptions, json_file: Path | None, *, quiet: bool) -> None:
    from ddetr_cli.cli.check import show_report
    from ddetr_cli.train.check import check_data

    with console.Progress(0, unit="pictures", description="check", quiet=quiet) as progress:
        report = check_data(options, begin=progress.extend, advance=progress.advance)
    show_report(report, sole_output=json_file is None)
    if json_file is not None:
        from ddetr_cli.atomic import write_json

        write_json(json_file, report.to_json())
    if report.refused:
        raise DatasetError(
            f"{options.data or options.annotations}: cannot be trained on ({report.refused} kinds of faults, listed "
            "as refused). Correct them."
        )
    if not quiet:
        console.say("this data set can be trained on")
