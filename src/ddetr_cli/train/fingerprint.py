"""What a data set was when a run began, short enough for its config.json, and what has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ddetr_cli.data.coco import image_path
from ddetr_cli.train.splits import Split

# Key -> what it is called where it has changed.
_DIGESTS = {
    "images_sha256": "its list of images",
    "boxes_sha256": "its boxes",
    "files_sha256": "the sizes of its picture files",
}


def fingerprint(split: Split) -> dict[str, Any]:
    """Counts and checksums of a split: of its list of images, of its boxes, of the sizes of its picture files."""
    data = split.annotations
    return {
        "image_count": len(data.images),
        "box_count": len(data.annotations),
        "images_sha256": _sha256((image.id, image.file_name, image.width, image.height) for image in data.images),
        "boxes_sha256": _sha256((a.image_id, a.category_id, a.bbox_xywh, a.iscrowd) for a in data.annotations),
        "files_sha256": _sha256(image_path(split.images, image).stat().st_size for image in data.images),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed in a split, in words."""
    found = []
    for key, unit in (("image_count", "images"), ("box_count", "boxes")):
        if before.get(key) != now[key]:
            found.append(f"{now[key]} {unit} instead of {before.get(key)}")
    # A list that has grown differs in everything else too.
    return found or [what for key, what in _DIGESTS.items() if before.get(key) != now[key]]


def _sha256(rows: Iterable[Any]) -> str:
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps(row).encode() + b"\n")
    return sha.hexdigest()
