"""Where the real images are, and a small data set whose scores can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.data.records import CocoAnnotation, CocoAnnotations, CocoCategory, CocoImage

Truth = Callable[..., CocoAnnotations]


@pytest.fixture(scope="session")
def truth() -> Truth:
    """Builds ground truth from (image id, category id, box) or (..., iscrowd); categories default to those used."""

    def build(*boxes: tuple[Any, ...], categories: tuple[CocoCategory, ...] = ()) -> CocoAnnotations:
        images = tuple(CocoImage(image, f"{image}.jpg", 640, 480) for image in dict.fromkeys(box[0] for box in boxes))
        annotations = tuple(
            CocoAnnotation(index + 1, image, category, bbox, bbox[2] * bbox[3], bool(crowd))
            for index, (image, category, bbox, *crowd) in enumerate(boxes)
        )
        used = categories or tuple(CocoCategory(c, f"class {c}") for c in dict.fromkeys(box[1] for box in boxes))
        return CocoAnnotations(Path("truth.json"), images, annotations, used)

    return build
