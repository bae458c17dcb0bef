"""The annotations of a split, read, validated and, where that is safe, repaired in memory before anything uses them.

pycocotools accepts much that silently changes a result: an annotation id 0 lowers AP, a string ``iscrowd`` makes
every box a crowd, a missing ``area`` is a bare KeyError. Here each is either repaired, with a counted sentence in
``repairs``, or refused with a ``DatasetError`` that names the file and the entry. The other layouts are turned into
COCO documents first, so that the same holds for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddetr_cli.data.entries import read_categories, read_images
from ddetr_cli.data.findings import Finding, Tally, refuse_if_needed
from ddetr_cli.data.jsonfile import collector_paused, kind, read_json, some
from ddetr_cli.data.layouts import DatasetPaths, split_name
from ddetr_cli.data.locate import Purpose
from ddetr_cli.data.records import CocoAnnotation, CocoAnnotations, CocoImage
from ddetr_cli.data.rows import AnnotationReader
from ddetr_cli.errors import DatasetError

_REMEDY = "Give a COCO annotation file."


def read_annotations(
    path: Path, *, purpose: Purpose = "eval", skip_bad: bool = False, max_bad: float = 0.05
) -> CocoAnnotations:
    """``read_split`` for a COCO annotation file alone."""
    paths = DatasetPaths(None, path, split_name(path))
    return read_split(paths, purpose=purpose, skip_bad=skip_bad, max_bad=max_bad)


def read_split(
    paths: DatasetPaths, *, purpose: Purpose = "eval", skip_bad: bool = False, max_bad: float = 0.05
) -> CocoAnnotations:
    """``inspect_split``, but raises DatasetError for anything that is refused."""
    read = inspect_split(paths, purpose=purpose, skip_bad=skip_bad, max_bad=max_bad)
    refuse_if_needed(read.path, read.findings)
    return read


def inspect_split(
    paths: DatasetPaths, *, purpose: Purpose = "eval", skip_bad: bool = False, max_bad: float = 0.05
) -> CocoAnnotations:
    """What can be used of a split's annotations for training or for scoring, and everything that is odd about them.

    Both: missing ``area`` becomes w*h and missing ``iscrowd`` 0; ``iscrowd`` may be 0, 1, true, false, "0", "1";
    annotation ids that are missing, repeated or 0 are renumbered from 1. ``train`` clips boxes to their image
    and drops those under one pixel or outside it; annotations of unknown images or categories are refused.
    ``eval`` scores boxes as they stand, dropping only those without width or height, and, as pycocotools does,
    annotations of unknown images or categories.

    ``skip_bad`` drops annotations that are otherwise refused, up to the share ``max_bad`` of all.
    """
    path = paths.annotations
    try:
        document, findings = _document(paths)
    except DatasetError as error:
        what = str(error).removeprefix(f"{path}: ").rstrip(".")
        return CocoAnnotations(path, (), (), (), (Finding("refused", what),))
    lists: dict[str, list[Any]] = {}
    for key in ("categories", "images", "annotations"):
        value = document.get(key)
        lists[key] = value if isinstance(value, list) else []
        if key not in document:
            there = some(sorted(map(str, document)))
            findings += (Finding("refused", f"no key {key!r} (there are: {there})", remedy=_REMEDY),)
        elif not isinstance(value, list):
            findings += (Finding("refused", f"{key!r} is {kind(value)}, not a list", remedy=_REMEDY),)
        elif not value and key != "annotations":
            findings += (Finding("refused", f"{key!r} is empty", remedy="Check the file."),)
    del document
    with collector_paused():
        categories, of_categories = read_categories(lists["categories"])
        images, of_images = read_images(lists["images"], is_upright=paths.layout == "yolo")
        if not (images and categories):  # then every annotation would be one of something unknown
            return CocoAnnotations(path, images, (), categories, findings + of_categories + of_images)
        total = len(lists["annotations"])
        reader = AnnotationReader(images, categories, purpose, total)
        annotations = tuple(reader.read(lists["annotations"]))
    findings += of_categories + of_images + reader.findings(skip_bad=skip_bad, max_bad=max_bad)
    if purpose == "train":
        findings += _backgrounds(images, annotations)
    if not any(finding.outcome == "refused" for finding in findings):
        if not annotations:
            what = f"no usable annotation among {total}, nothing to {purpose} on"
            findings += (Finding("refused", what, remedy="Check the file."),)
        elif purpose == "train" and all(annotation.iscrowd for annotation in annotations):
            what = "nothing but crowd regions, no object to train on"
            findings += (Finding("refused", what, remedy="Check iscrowd."),)
    return CocoAnnotations(path, images, annotations, categories, findings)


def _document(paths: DatasetPaths) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    """The split as COCO has it. Raises DatasetError where nothing at all can be made of it."""
    if paths.layout == "yolo":
        from ddetr_cli.data.yolo import read_yolo

        return read_yolo(paths)
    if paths.layout == "voc":
        from ddetr_cli.data.voc import read_voc

        return read_voc(paths)
    document = read_json(paths.annotations, without="segmentation")
    if not isinstance(document, dict):
        raise DatasetError(
            f"{paths.annotations}: top level is {kind(document)}, not an object with images, annotations and "
            f"categories. {_REMEDY}"
        )
    return document, ()


def _backgrounds(images: tuple[CocoImage, ...], annotations: tuple[CocoAnnotation, ...]) -> tuple[Finding, ...]:
    """The images a training sees nothing in."""
    listed = {annotation.image_id for annotation in annotations}
    with_objects = {annotation.image_id for annotation in annotations if not annotation.iscrowd}
    tally = Tally("images", len(images))
    for image in images:
        if image.id not in listed:
            tally.add("background", "without annotations", image.file_name)
        elif image.id not in with_objects:
            tally.add("background", "with crowd regions only", image.file_name)
    return tally.findings()
