"""The picture files of a data set: where each is, whether it is the one that was annotated, and its pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

from PIL import Image

from ddetr_cli.data.findings import Finding, Outcome, Tally, refuse_if_needed
from ddetr_cli.data.records import CocoAnnotations, CocoImage
from ddetr_cli.errors import DatasetError, ImageError

_CHUNK = 512  # pictures in the hands of the threads at a time; between two chunks Ctrl-C is heard

_OUTSIDE = "file_name leads outside the image folder"
_MISSING = "picture file is missing"
_UNREADABLE = "picture file cannot be read"
_OTHER_SIZE = "picture is of another size than its annotations say"
_TURNED = "picture fits its annotations only when turned upright, and is"
_OUTCOMES: dict[str, tuple[Outcome, str]] = {
    _OUTSIDE: ("refused", "Use names relative to that folder."),
    _OTHER_SIZE: ("refused", "Use the pictures that were annotated."),
    _TURNED: ("repaired", ""),
}


def image_path(root: Path, image: CocoImage) -> Path:
    """Where the picture of ``image`` is under ``root``. Raises DatasetError for names that lead out of it."""
    name = PurePosixPath(image.file_name)
    if name.is_absolute() or ".." in name.parts or "\0" in image.file_name or Path(image.file_name).is_absolute():
        raise DatasetError(
            f"{root}: file_name {image.file_name!r} of image {image.id!r} leads outside the image folder. "
            "Use names relative to that folder."
        )
    return root / name


def read_dataset_image(root: Path, image: CocoImage) -> Image.Image:
    """The picture of ``image`` as RGB, in the orientation its annotations were made in.

    COCO's boxes refer to the stored pixels, so EXIF is ignored, unless only the upright picture has the listed
    size; YOLO's refer to the upright picture. Raises ImageError for an unreadable file, DatasetError where neither
    has the listed size.
    """
    from ddetr_cli.data.images import read_image

    path = image_path(root, image)
    listed = (image.width, image.height)
    picture = read_image(path, upright=image.is_upright)
    if picture.size == listed:
        return picture
    if picture.size == listed[::-1] and not image.is_upright:
        upright = read_image(path)
        if upright.size == listed:
            return upright
    raise DatasetError(
        f"{path}: {picture.width}x{picture.height} px, but its annotations say {image.width}x{image.height} "
        f"(image {image.id!r}). Use the pictures the annotations were made for."
    )


def check_images(
    annotations: CocoAnnotations, root: Path, *, skip_missing: bool = False, max_bad: float = 0.05
) -> CocoAnnotations:
    """``inspect_images``, but raises DatasetError for anything that is refused."""
    checked = inspect_images(annotations, root, skip_missing=skip_missing, max_bad=max_bad)
    refuse_if_needed(root, checked.findings)
    return checked


def inspect_images(
    annotations: CocoAnnotations,
    root: Path,
    *,
    skip_missing: bool = False,
    max_bad: float = 0.05,
    decode: Collection[int] = (),
    on_image: Callable[[], None] | None = None,
) -> CocoAnnotations:
    """``annotations`` without the images that cannot be used, and with what is wrong with them among its findings.

    Of every image under ``root`` the header is read, of those at the positions ``decode`` also the pixels. With
    ``skip_missing`` images that are missing or unreadable are dropped, unless more than ``max_bad`` of all.
    """
    total = len(annotations.images)

    def look(index: int) -> tuple[str, str] | None:
        return _look(root, annotations.images[index], has_to_decode=index in decode)

    kept: list[CocoImage] = []
    tally, unusable = Tally("images", total), Tally("images", total)
    # Opening a file is mostly waiting for the disk, and decoding leaves Python to the other threads.
    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        for start in range(0, total, _CHUNK):
            chunk = range(start, min(start + _CHUNK, total))
            for index, found in zip(chunk, pool.map(look, chunk), strict=True):
                if found is None or found[0] == _TURNED:
                    kept.append(annotations.images[index])
                if found is not None:
                    what, example = found
                    if what in (_MISSING, _UNREADABLE):
                        unusable.add("refused", what, example)
                    else:
                        outcome, remedy = _OUTCOMES[what]
                        tally.add(outcome, what, example, remedy=remedy)
                if on_image is not None:
                    on_image()
    findings = _with_outcome(unusable, total, skip_missing=skip_missing, max_bad=max_bad) + tally.findings()
    if not findings:
        return annotations
    checked = annotations if len(kept) == total else annotations.subset(kept)
    return replace(checked, findings=annotations.findings + findings)


def _look(root: Path, image: CocoImage, *, has_to_decode: bool) -> tuple[str, str] | None:
    """What is the matter with one picture, and the example of it; None for nothing."""
    from ddetr_cli.data.images import read_size

    try:
        path = image_path(root, image)
    except DatasetError:
        return _OUTSIDE, f"image {image.id!r}: {image.file_name!r}"
    if not path.is_file():
        return _MISSING, image.file_name
    try:
        stored, upright = read_size(path)
        if has_to_decode:
            read_dataset_image(root, image)
    except ImageError as error:
        return _UNREADABLE, f"{image.file_name}: {str(error).removeprefix(f'{path}: ').split('. ')[0]}"
    except DatasetError:  # of another size, as the header says too
        pass
    listed = (image.width, image.height)
    fitting = [upright] if image.is_upright else [stored, upright]
    if listed not in fitting:
        width, height = fitting[0]
        return _OTHER_SIZE, f"{image.file_name}: {width}x{height}, annotated as {image.width}x{image.height}"
    return (_TURNED, image.file_name) if listed != fitting[0] else None


def _with_outcome(unusable: Tally, total: int, *, skip_missing: bool, max_bad: float) -> tuple[Finding, ...]:
    findings = unusable.findings()
    count = sum(finding.count for finding in findings)
    if not count:
        return ()
    if not skip_missing:
        remedy = "Check the image folder" + (", or pass --skip-missing." if count <= max_bad * total else ".")
        return tuple(replace(finding, remedy=remedy) for finding in findings)
    dropped = tuple(replace(finding, outcome="dropped") for finding in findings)
    if count <= max_bad * total and count < total:
        return dropped
    what = f"unusable, more than the {max_bad:.3g} of all that --skip-missing may drop"
    remedy = "Check the image folder, or raise --max-bad."
    return (Finding("refused", what, count, total, "images", findings[0].examples, remedy), *dropped)
