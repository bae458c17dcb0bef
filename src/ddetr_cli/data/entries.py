"""The categories and images of a COCO document, entry by entry: taken, or counted as what is wrong with them."""

from __future__ import annotations

from typing import Any

from ddetr_cli.data.findings import Finding, Tally, repeated
from ddetr_cli.data.jsonfile import kind, number, plain_id, short
from ddetr_cli.data.records import CocoCategory, CocoImage

_OF_CATEGORY = frozenset({"id", "name"})
_OF_IMAGE = frozenset({"id", "file_name", "width", "height"})


def read_categories(raw: list[Any]) -> tuple[tuple[CocoCategory, ...], tuple[Finding, ...]]:
    """The categories that can be used, and what is odd about the list."""
    tally = Tally("categories", len(raw))
    categories: dict[Any, CocoCategory] = {}
    for index, entry in enumerate(raw):
        where = f"categories[{index}]"
        fault = missing_field(entry, _OF_CATEGORY)
        category_id = None if fault else plain_id(entry["id"])
        if fault or category_id is None:
            tally.add("refused", fault or "id is neither integer nor string", where, remedy="Correct the file.")
            continue
        if category_id in categories:
            tally.add("refused", "category id occurs repeatedly", repr(category_id), remedy="Make them unique.")
            continue
        if not isinstance(entry["name"], str):
            tally.add("repaired", "name is not a string, taken as text", short(entry["name"]))
        categories[category_id] = CocoCategory(category_id, str(entry["name"]))
    for name in repeated(category.name for category in categories.values()):
        tally.add("noted", "name belongs to several categories, which stay apart by their ids", name)
    return tuple(categories.values()), tally.findings()


def read_images(raw: list[Any], *, is_upright: bool) -> tuple[tuple[CocoImage, ...], tuple[Finding, ...]]:
    """The images that can be used, and what is wrong with the list."""
    tally = Tally("images", len(raw))
    images: dict[Any, CocoImage] = {}
    for index, entry in enumerate(raw):
        where = f"images[{index}]"
        fault = missing_field(entry, _OF_IMAGE)
        if fault:
            tally.add("refused", fault, where, remedy="Give a COCO annotation file.")
            continue
        image_id, name = plain_id(entry["id"]), entry["file_name"]
        width, height = number(entry["width"]), number(entry["height"])
        if image_id is None:
            tally.add(
                "refused", "id is neither integer nor string", f"{where}: {short(entry['id'])}", remedy="Correct it."
            )
        elif not isinstance(name, str) or not name:
            tally.add("refused", "file_name is not a name", f"image {image_id!r}: {short(name)}", remedy="Name it.")
        elif not width or not height or min(width, height) < 1 or width % 1 or height % 1:
            size = f"image {image_id!r}: {short(entry['width'])}x{short(entry['height'])}"
            tally.add("refused", "width and height are not a size in pixels", size, remedy="Give its size.")
        elif image_id in images:
            tally.add("refused", "image id occurs repeatedly", repr(image_id), remedy="Make them unique.")
        else:
            images[image_id] = CocoImage(image_id, name, int(width), int(height), is_upright)
    for name in repeated(image.file_name for image in images.values()):
        tally.add("refused", "file_name occurs repeatedly", name, remedy="Make them unique.")
    return tuple(images.values()), tally.findings()


def missing_field(entry: Any, fields: frozenset[str]) -> str | None:
    """What keeps an entry from having these fields, or None."""
    if type(entry) is dict and entry.keys() >= fields:
        return None
    if not isinstance(entry, dict):
        return f"{kind(entry)}, not an object"
    return next((f"no {field!r}" for field in sorted(fields) if field not in entry), None)
