"""The two parts of a data set a run needs: what it learns from, and what decides which epoch was best."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ddetr_cli.data.coco import (
    CocoAnnotations,
    DatasetPaths,
    Purpose,
    hold_out,
    inspect_images,
    inspect_split,
    locate_dataset,
)
from ddetr_cli.data.findings import EXAMPLES, Finding, Tally, refuse_if_needed, told
from ddetr_cli.errors import DatasetError
from ddetr_cli.evaluate.mapping import map_classes
from ddetr_cli.train.loop import Progress
from ddetr_cli.train.options import TrainOptions

MANY_PICTURES = 10_000  # two seconds of silence from a quick disk, and minutes from a slow one


@dataclass(frozen=True)
class Split:
    """A part of a data set: its annotations and the folder of its images."""

    annotations: CocoAnnotations
    images: Path


@dataclass(frozen=True)
class Splits:
    """Both parts; ``findings`` are about the two together, those of each are in its annotations."""

    train: Split
    val: Split
    findings: tuple[Finding, ...]


class Inspection:
    """How closely the pictures are looked at: every header, and nothing else. ``check`` looks closer."""

    def positions_to_decode(self, annotations: CocoAnnotations) -> Collection[int]:
        """The images of a split whose pixels are to be decoded."""
        return ()

    def begin(self, count: int) -> None:
        """``count`` more pictures are about to be looked at."""

    def advance(self) -> None:
        """One of them is done."""


class _Announced(Inspection):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def begin(self, count: int) -> None:
        if count >= MANY_PICTURES:
            self._progress.note(f"reading the headers of {count:,} pictures")


def read_splits(options: TrainOptions, progress: Progress) -> tuple[Split, Split]:
    """(train, val): the data set's own val split, else every tenth training image.

    The header of every picture is read: a run of days must not end at one that is missing. Raises UsageError or
    DatasetError.
    """
    splits = inspect_splits(options, _Announced(progress))
    found = [
        (splits.train.annotations.path, splits.train.annotations.findings),
        (splits.val.annotations.path, splits.val.annotations.findings),
        (options.data or splits.train.annotations.path, splits.findings),
    ]
    for where, findings in found:
        refuse_if_needed(where, findings)
    for where, findings in found:
        for sentence in told(where, findings):
            progress.warn(sentence)
    return splits.train, splits.val


def inspect_splits(options: TrainOptions, inspection: Inspection) -> Splits:
    """Both parts with everything that is odd or wrong about them. Raises UsageError where there is no data set."""
    paths = locate_dataset(
        options.data, split=options.split, images=options.images, annotations=options.annotations, purpose="train"
    )
    train = _with_untaught_classes(_inspect(paths, "train", options, inspection))
    if paths.val is not None:
        val = _inspect(paths.val, "eval", options, inspection)
        return Splits(train, val, _of_both(train, val))
    count = len(train.annotations.images)
    kept, held = hold_out(train.annotations)
    val = Split(replace(held, findings=()), train.images)
    train = replace(train, annotations=kept)
    if any(finding.outcome == "refused" for finding in kept.findings):
        return Splits(train, val, ())
    if not held.images:
        what = f"no val split, and {count} images are too few to hold some out for validation"
        return Splits(train, val, (Finding("refused", what, remedy="Give a val split, or at least 10 images."),))
    if all(annotation.iscrowd for annotation in kept.annotations):
        what = "no object to train on is left where every tenth image is held out for validation"
        return Splits(train, val, (Finding("refused", what, remedy="Give a val split."),))
    what = f"no val split: every tenth training image is held out ({len(held.images)} of {count})"
    return Splits(train, val, (Finding("noted", what),))


def crowded_images(split: Split, queries: int) -> tuple[Finding, ...]:
    """Images with more objects than a model of so many queries can find."""
    tally = Tally("images", len(split.annotations.images))
    for image in split.annotations.images:
        count = sum(not annotation.iscrowd for annotation in split.annotations.by_image[image.id])
        if count > queries:
            what = f"have more objects than the {queries} queries of the model, which finds no more than that"
            tally.add("noted", what, f"{image.file_name}: {count}", remedy="Consider more --queries.")
    return tally.findings()


def _inspect(paths: DatasetPaths, purpose: Purpose, options: TrainOptions, inspection: Inspection) -> Split:
    read = inspect_split(paths, purpose=purpose, skip_bad=options.skip_bad_annotations, max_bad=options.max_bad)
    if paths.images is None:
        no_folder = Finding("refused", "no folder of images beside it", remedy="Give --images DIR.")
        return Split(replace(read, findings=(*read.findings, no_folder)), read.path.parent)
    inspection.begin(len(read.images))
    checked = inspect_images(
        read,
        paths.images,
        skip_missing=options.skip_missing,
        max_bad=options.max_bad,
        decode=inspection.positions_to_decode(read),
        on_image=inspection.advance,
    )
    return Split(checked, paths.images)


def _with_untaught_classes(train: Split) -> Split:
    annotations = train.annotations
    taught = {annotation.category_id for annotation in annotations.annotations if not annotation.iscrowd}
    tally = Tally("categories", len(annotations.categories))
    for category in annotations.categories if taught else ():
        if category.id not in taught:
            tally.add("noted", "have no object to learn them from", category.name)
    return replace(train, annotations=replace(annotations, findings=annotations.findings + tally.findings()))


def _of_both(train: Split, val: Split) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    trained = {name for name, _ in _files(train)}
    shared = [file_name for name, file_name in _files(val) if name in trained]
    if shared:
        what = "of val are trained on too: the validation numbers will be too good"
        findings.append(
            Finding("noted", what, len(shared), len(val.annotations.images), "images", tuple(shared[:EXAMPLES]))
        )
    if train.annotations.categories and val.annotations.categories:
        try:
            mapping = map_classes(train.annotations.class_table(), val.annotations.categories)
        except DatasetError as error:
            findings.append(Finding("refused", str(error).rstrip(".")))
        else:
            known = set(mapping.category_ids)
            unknown = [category.name for category in val.annotations.categories if category.id not in known]
            if unknown:
                what = "of val are not among those trained on, their AP will be 0"
                count = len(val.annotations.categories)
                findings.append(Finding("noted", what, len(unknown), count, "categories", tuple(unknown[:EXAMPLES])))
    return tuple(findings)


def _files(split: Split) -> list[tuple[str, str]]:
    """(absolute name, name in the data set) of every picture."""
    root = split.images.resolve()
    return [(f"{root}/{image.file_name}", image.file_name) for image in split.annotations.images]
