"""Annotations in the layout of Pascal VOC: for every picture an XML file of named boxes, corners in pixels.

VOC counts pixels from 1 and means the last one too: the box of a whole picture is 1, 1, width, height. A set that
holds a coordinate 0 counts from 0. Objects marked ``difficult`` are neither trained nor scored on, as in VOC's own
scoring: they become crowd regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ddetr_cli.data.findings import Finding, Tally
from ddetr_cli.data.formats import ACCEPTED_SUFFIXES
from ddetr_cli.data.layouts import DatasetPaths, voc_folders
from ddetr_cli.data.textfile import read_utf8
from ddetr_cli.errors import DatasetError

_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class _Object:
    """One ``<object>``; ``corners`` are numbers, or text where they are none."""

    name: str | None
    corners: Sequence[Any]
    is_difficult: bool


@dataclass(frozen=True)
class _Picture:
    """What one XML file says."""

    file_name: str | None
    size: tuple[Any, Any]
    objects: list[_Object]


def read_voc(paths: DatasetPaths) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    """The split as a COCO document, and what is odd about its files.

    Category ids are ranks among the names of all splits, which so agree on them; image ids are the names of the XML
    files without .xml, annotation ids name file and object. Raises DatasetError where there is no XML file.
    """
    folders = voc_folders(paths)
    files = {folder: sorted(folder.glob("*.xml")) for folder in folders}
    if not files[paths.annotations]:
        raise DatasetError(f"{paths.annotations}: no XML file in it. Check the path.")
    tally = Tally("XML files", len(files[paths.annotations]))
    read = {folder: _read_folder(files[folder], tally if folder == paths.annotations else None) for folder in files}
    objects = [found for pictures in read.values() for picture in pictures.values() for found in picture.objects]
    names = sorted({found.name for found in objects if found.name is not None})
    category_ids = {name: index + 1 for index, name in enumerate(names)}
    first = 0 if any(0 in found.corners[:2] for found in objects) else 1

    pictures = read[paths.annotations]
    file_names = _file_names(paths.images)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for stem in _stems(paths, pictures, file_names, tally):
        picture = pictures[stem]
        file_name = file_names.get(stem) or picture.file_name or f"{stem}.jpg"
        width, height = picture.size
        images.append({"id": stem, "file_name": file_name, "width": width, "height": height})
        for number, found in enumerate(picture.objects, start=1):
            bbox = _bbox(found.corners, first)
            annotations.append(
                {
                    "id": f"{stem}.xml:{number}",
                    "image_id": stem,
                    "category_id": category_ids.get(found.name or ""),
                    "bbox": bbox,
                    "area": abs(bbox[2] * bbox[3]) if len(bbox) == 4 else None,
                    "iscrowd": int(found.is_difficult),
                }
            )
    categories = [{"id": category_id, "name": name} for name, category_id in category_ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, tally.findings()


def _read_folder(files: list[Path], tally: Tally | None) -> dict[str, _Picture]:
    pictures: dict[str, _Picture] = {}
    for file in files:
        try:
            pictures[file.stem] = _read(file)
        except DatasetError as error:
            if tally is not None:
                reason = str(error).removeprefix(f"{file}: ").split(". ")[0]
                tally.add("refused", "cannot be read", f"{file.name}: {reason}", remedy="Correct or remove them.")
    return pictures


def _read(file: Path) -> _Picture:
    text = read_utf8(file, "XML", max_bytes=_MAX_BYTES)
    # Entities can name other files, and grow without end; annotations have no use for them.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DatasetError(f"{file}: declares a document type, which annotations need not. Remove it.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        line, column = error.position
        why = str(error).split(":")[0]
        raise DatasetError(f"{file}: line {line}, column {column + 1}: not XML ({why}). Copy it again.") from error
    size = (_number(root.findtext("size/width")), _number(root.findtext("size/height")))
    objects = [
        _Object(
            name=(found.findtext("name") or "").strip() or None,
            corners=[_number(found.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")],
            is_difficult=(found.findtext("difficult") or "").strip() == "1",
        )
        for found in root.findall("object")
    ]
    return _Picture((root.findtext("filename") or "").strip() or None, size, objects)


def _number(text: str | None) -> Any:
    """The number, else the text as it is, for the reader of annotations to refuse."""
    try:
        return float(text or "")
    except ValueError:
        return text


def _bbox(corners: Sequence[Any], first: int) -> list[Any]:
    """x, y, width, height; the corners as they are where they are no numbers."""
    if not all(isinstance(value, float) for value in corners):
        return [*corners, "(corners)"]
    x0, y0, x1, y1 = corners
    # Counted from 1 the last pixel belongs to the box; counted from 0 the numbers are edges.
    return [x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first]


def _file_names(images: Path | None) -> dict[str, str]:
    """Stem -> name of the pictures in a folder."""
    if images is None:
        return {}
    return {file.stem: file.name for file in sorted(images.iterdir()) if file.suffix.lower() in ACCEPTED_SUFFIXES}


def _stems(paths: DatasetPaths, pictures: dict[str, _Picture], file_names: dict[str, str], tally: Tally) -> list[str]:
    """The pictures of the split, counting those that have no XML file."""
    if paths.listing is None:
        for stem in sorted(file_names.keys() - pictures.keys()):
            tally.add("noted", "missing for a picture, which is left out", file_names[stem])
        return list(pictures)
    listed = [line.strip() for line in read_utf8(paths.listing, "text").splitlines() if line.strip()]
    stems = [line if line in pictures else line.split()[0] for line in listed]
    for stem in dict.fromkeys(stems):
        if stem not in pictures:
            what = f"missing or not readable for a picture of {paths.listing.name}"
            tally.add("refused", what, stem, remedy="Add them, or take the pictures out of the list.")
    return [stem for stem in dict.fromkeys(stems) if stem in pictures]
