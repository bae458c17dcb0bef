"""Data sets with boxes, whatever their layout: where they are, what they hold, and their pictures."""

from __future__ import annotations

from ddetr_cli.data.annotations import inspect_split, read_annotations, read_split
from ddetr_cli.data.layouts import DatasetPaths
from ddetr_cli.data.locate import Purpose, locate_dataset
from ddetr_cli.data.pictures import check_images, image_path, inspect_images, read_dataset_image
from ddetr_cli.data.records import CocoAnnotation, CocoAnnotations, CocoCategory, CocoImage

__all__ = [
    "CocoAnnotation",
    "CocoAnnotations",
    "CocoCategory",
    "CocoImage",
    "DatasetPaths",
    "Purpose",
    "check_images",
    "hold_out",
    "image_path",
    "inspect_images",
    "inspect_split",
    "locate_dataset",
    "read_annotations",
    "read_dataset_image",
    "read_split",
]


def hold_out(annotations: CocoAnnotations, every: int = 10) -> tuple[CocoAnnotations, CocoAnnotations]:
    """(training part, held-out part): every ``every``-th image, in the order of the file, is held out."""
    held = annotations.images[every - 1 :: every]
    kept = [image for index, image in enumerate(annotations.images) if index % every != every - 1]
    return annotations.subset(kept), annotations.subset(held)
