"""Labels in YOLO's layout: a text file for every picture, lines ``class x y w h``, fractions of the upright picture.

A line of more numbers is a polygon; its bounding box is taken. A picture without a label file has nothing in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddetr_cli.data.datayaml import read_data_yaml
from ddetr_cli.data.findings import Finding, Tally
from ddetr_cli.data.formats import ACCEPTED_SUFFIXES
from ddetr_cli.data.layouts import DatasetPaths
from ddetr_cli.data.textfile import read_utf8
from ddetr_cli.errors import DatasetError, ImageError

_MAX_BYTES = 64 << 20


def read_yolo(paths: DatasetPaths) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    """The split as a COCO document, and what is odd about its files.

    Image ids are the names of the files below ``paths.images``, annotation ids name label file and line. Raises
    DatasetError where there is no such folder, no picture in it, or labels that are not fractions.
    """
    from ddetr_cli.data.images import read_size

    names = read_data_yaml(paths.annotations).names
    root = _folder(paths)
    pictures = sorted(p for p in root.rglob("*") if p.suffix.lower() in ACCEPTED_SUFFIXES and p.is_file())
    if not pictures:
        raise DatasetError(f"{paths.annotations}: no picture in {root} ({paths.split!r}). Check the paths in it.")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    tally = Tally("images", len(pictures))
    beyond = 0
    for picture in pictures:
        name = picture.relative_to(root).as_posix()
        try:
            _, (width, height) = read_size(picture)
        except ImageError as error:
            reason = str(error).removeprefix(f"{picture}: ").split(". ")[0]
            tally.add("refused", "cannot be read", f"{name}: {reason}", remedy="Replace or remove them.")
            continue
        images.append({"id": name, "file_name": name, "width": width, "height": height})
        labels = label_file(picture)
        if not labels.exists():
            continue
        for number, line in enumerate(read_utf8(labels, "text", max_bytes=_MAX_BYTES).splitlines(), start=1):
            if not line.strip():
                continue
            category, bbox = _parse(line.split(), width, height)
            is_box = len(bbox) == 4
            annotations.append(
                {
                    "id": f"{labels.name}:{number}",
                    "image_id": name,
                    "category_id": category,
                    "bbox": bbox,
                    "area": abs(bbox[2] * bbox[3]) if is_box else None,
                    "iscrowd": 0,
                }
            )
            beyond += is_box and bbox[0] > width and bbox[1] > height
    if annotations and beyond > len(annotations) / 2:
        raise DatasetError(
            f"{label_file(root / images[0]['id']).parent}: labels look like pixels ({beyond} of {len(annotations)} "
            "boxes lie outside their picture). Write them as fractions of its width and height."
        )
    categories = [{"id": index, "name": name} for index, name in sorted(names.items())]
    return {"images": images, "annotations": annotations, "categories": categories}, tally.findings()


def label_file(picture: Path) -> Path:
    """Where the labels of a picture are: in ``labels/`` instead of the last ``images/`` of its path, or beside it."""
    parts = list(picture.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _folder(paths: DatasetPaths) -> Path:
    if paths.images is not None and paths.images.is_dir():
        return paths.images
    raise DatasetError(
        f"{paths.annotations}: {paths.split!r} is {paths.images}, not a folder of pictures. Correct the path, or put "
        "the pictures of a list into a folder."
    )


def _parse(fields: list[str], width: int, height: int) -> tuple[Any, list[Any]]:
    """(class index, [x, y, w, h] in pixels); what is not understood stays as text, for the reader to refuse."""
    category: Any = int(fields[0]) if fields[0].isdecimal() else fields[0]
    try:
        values = [float(field) for field in fields[1:]]
    except ValueError:
        return category, [" ".join(fields[1:])]
    if len(values) == 4:
        x, y, w, h = values
        return category, [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
    if len(values) >= 6 and len(values) % 2 == 0:
        xs, ys = [v * width for v in values[::2]], [v * height for v in values[1::2]]
        return category, [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return category, values
