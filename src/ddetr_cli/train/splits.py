"""The two parts of a data set a run needs: what it learns from, and what decides which epoch was best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddetr_cli.data.coco import CocoAnnotations, Purpose, check_images, hold_out, locate_dataset, read_annotations
from ddetr_cli.errors import DatasetError
from ddetr_cli.train.loop import Progress
from ddetr_cli.train.options import TrainOptions


@dataclass(frozen=True)
class Split:
    """A part of a data set: its annotations and the folder of its images."""

    annotations: CocoAnnotations
    images: Path


def read_splits(options: TrainOptions, progress: Progress) -> tuple[Split, Split]:
    """(train, val): the data set's own val split, else every tenth training image.

    Every image is checked to exist. Raises UsageError or DatasetError.
    """
    paths = locate_dataset(
        options.data, split=options.split, images=options.images, annotations=options.annotations, purpose="train"
    )
    train = _read(paths.annotations, paths.images, "train", progress)
    if paths.val is not None:
        val = _read(paths.val.annotations, paths.val.images, "eval", progress)
    else:
        count = len(train.annotations.images)
        kept, held = hold_out(train.annotations)
        if not held.images:
            raise DatasetError(
                f"{paths.annotations}: {count} images are too few to hold some out for validation. "
                "Give a val split, or at least 10 images."
            )
        progress.warn(f"no val split: every tenth training image is held out ({len(held.images)} of {count}).")
        train, val = Split(kept, train.images), Split(held, train.images)
    if not train.annotations.annotations:
        raise DatasetError(f"{paths.annotations}: no annotation to train on. Check the file.")
    return train, val


def _read(annotations: Path, images: Path | None, purpose: Purpose, progress: Progress) -> Split:
    read = read_annotations(annotations, purpose=purpose)
    if images is None:
        raise DatasetError(f"{annotations}: no folder of images beside it. Give --images DIR.")
    for repair in read.repairs:
        progress.warn(f"{annotations}: {repair}")
    checked, _ = check_images(read, images)
    return Split(checked, images)
