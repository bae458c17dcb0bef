"""COCO data sets: where they are, what they hold, and their pictures as the annotations mean them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from PIL import Image

from ddetr_cli.data.annotations import read_annotations
from ddetr_cli.data.jsonfile import some
from ddetr_cli.data.locate import DatasetPaths, Purpose, locate_dataset
from ddetr_cli.data.records import CocoAnnotation, CocoAnnotations, CocoCategory, CocoImage
from ddetr_cli.errors import DatasetError

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
    "locate_dataset",
    "read_annotations",
    "read_dataset_image",
]


def image_path(root: Path, image: CocoImage) -> Path:
    """Where the picture of ``image`` is under ``root``. Raises DatasetError for names that lead out of it."""
    name = PurePosixPath(image.file_name)
    if name.is_absolute() or ".." in name.parts or "\0" in image.file_name or Path(image.file_name).is_absolute():
        raise DatasetError(
            f"{root}: file_name {image.file_name!r} of image {image.id!r} leads outside the image folder. "
            "Use names relative to that folder."
        )
    return root / name


def check_images(
    annotations: CocoAnnotations, root: Path, *, skip_missing: bool = False
) -> tuple[CocoAnnotations, int]:
    """``annotations`` without the images whose file is missing under ``root``, and how many those are.

    Raises DatasetError listing the first five missing unless ``skip_missing``, and always where all are missing.
    """
    present = [image for image in annotations.images if image_path(root, image).is_file()]
    missing = len(annotations.images) - len(present)
    if not missing:
        return annotations, 0
    if skip_missing and present:
        return annotations.subset(present), missing
    is_present = {image.id for image in present}
    names = [image.file_name for image in annotations.images if image.id not in is_present]
    raise DatasetError(
        f"{root}: {missing} of {len(annotations.images)} images of {annotations.path} are missing ({some(names)}). "
        "Check the image folder."
    )


def read_dataset_image(root: Path, image: CocoImage) -> Image.Image:
    """The picture of ``image`` as RGB, in the orientation its annotations were made in.

    COCO's boxes refer to the stored pixels, so EXIF is ignored, unless only the upright picture has the listed
    size. Raises ImageError for an unreadable file, DatasetError where neither has the listed size.
    """
    from ddetr_cli.data.images import read_image

    path = image_path(root, image)
    listed = (image.width, image.height)
    stored = read_image(path, upright=False)
    if stored.size == listed:
        return stored
    if stored.size == listed[::-1]:
        upright = read_image(path)
        if upright.size == listed:
            return upright
    raise DatasetError(
        f"{path}: {stored.width}x{stored.height} px, but its annotations say {image.width}x{image.height} "
        f"(image {image.id!r}). Use the pictures the annotations were made for."
    )


def hold_out(annotations: CocoAnnotations, every: int = 10) -> tuple[CocoAnnotations, CocoAnnotations]:
    """(training part, held-out part): every ``every``-th image, in the order of the file, is held out."""
    held = annotations.images[every - 1 :: every]
    kept = [image for index, image in enumerate(annotations.images) if index % every != every - 1]
    return annotations.subset(kept), annotations.subset(held)
