"""A part of a data set: the images that a list names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

from ddetr_cli.data.coco import CocoAnnotations, CocoImage
from ddetr_cli.data.jsonfile import some
from ddetr_cli.data.textfile import read_utf8
from ddetr_cli.errors import DatasetError


def listed_images(path: Path, annotations: CocoAnnotations) -> CocoAnnotations:
    """Only the images that the text file names, one a line, in the order of ``annotations``.

    A line is the file name as the annotations have it, a path that ends in a name of theirs, or an image id. Raises
    DatasetError where one is none of that, or the list is empty.
    """
    lines = [line for line in map(str.strip, read_utf8(path, "text").splitlines()) if line]
    if not lines:
        raise DatasetError(f"{path}: an empty list of images. Name one image a line.")
    by_name = {image.file_name: image for image in annotations.images}
    by_id = {str(image.id): image for image in annotations.images}
    counts = Counter(PurePosixPath(image.file_name).name for image in annotations.images)
    by_end = {end: image for image in annotations.images if counts[end := PurePosixPath(image.file_name).name] == 1}

    def found(line: str) -> CocoImage | None:
        return by_name.get(line) or by_id.get(line) or by_end.get(PurePosixPath(line).name)

    unknown = [line for line in lines if found(line) is None]
    if unknown:
        raise DatasetError(
            f"{path}: {len(unknown)} of {len(lines)} lines name no image of {annotations.path} ({some(unknown)}). "
            "Name them as its annotations do, or by id."
        )
    chosen = {image.id for image in map(found, lines) if image is not None}
    return annotations.subset(image for image in annotations.images if image.id in chosen)
