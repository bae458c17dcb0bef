"""A small data set whose scores can be computed by hand, and random ones that are hard to score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddetr_cli.data.records import CocoAnnotation, CocoAnnotations, CocoCategory, CocoImage, ImageId
from ddetr_cli.evaluate.table import Detection

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


# Ids as data sets have them: plain, text, huge, mixed, negative, from 0.
IDS: tuple[Callable[[int], ImageId], ...] = (
    lambda i: i,
    str,
    lambda i: i + 2**60,
    lambda i: str(i) if i % 2 else i,
    lambda i: -3 * i,
    lambda i: i - 1,
)


def _random_set(seed: int) -> tuple[CocoAnnotations, list[Detection]]:
    """A small data set with all that makes scoring hard, and detections near its objects and elsewhere.

    Crowds, boxes of equal overlap (on a grid), equal scores, areas on the borders of the sizes, images and classes
    without objects or detections, over 100 detections in one image, unlisted categories, any order.
    """
    r = np.random.default_rng(seed)
    image_id, category_id = (IDS[int(i)] for i in r.integers(0, len(IDS), 2))
    images = [CocoImage(image_id(int(i)), f"{i}.jpg", 640, 480) for i in r.permutation(int(r.integers(1, 9))) + 1]
    categories = [CocoCategory(category_id(int(i)), f"c{i}") for i in r.permutation(int(r.integers(1, 5))) + 1]
    is_grid, is_dense, has_ties, is_blind = (r.random(4) < (0.5, 0.2, 0.5, 0.05)).tolist()
    area_kind = r.integers(3)

    def boxes(count: int) -> np.ndarray:
        if is_grid:
            corner, size = 20 * r.integers(0, 6, (count, 2)), 20 * r.integers(1, 6, (count, 2))
        else:
            corner, size = r.uniform(0, 200, (count, 2)), np.exp(r.uniform(1.5, 5, (count, 2)))
        return np.concatenate([corner, size], axis=1).astype(float)

    annotations: list[CocoAnnotation] = []
    detections: list[Detection] = []
    for image in images:
        objects = boxes(int(r.integers(0, 40 if is_dense else 8)) if r.random() > 0.15 else 0)
        classes = r.integers(0, len(categories), len(objects))
        area = objects[:, 2] * objects[:, 3]
        if area_kind == 1:
            area = area * r.uniform(0, 2, len(area))
        elif area_kind == 2:
            area = r.choice([0, 400, 1023.9, 1024, 9216, 9216.1, 1e11], len(area)).astype(float)
        for k, box in enumerate(objects.tolist()):
            ids = len(annotations) + 1, image.id, categories[classes[k]].id
            annotations.append(CocoAnnotation(*ids, tuple(box), float(area[k]), bool(r.random() < 0.15)))
        found = boxes(int(r.integers(0, 260 if is_dense else 30)) if r.random() > 0.1 and not is_blind else 0)
        labels = r.integers(0, len(categories), len(found))
        if len(objects) and r.random() < 0.8:
            near = r.integers(0, len(objects), len(found))
            shift = (
                r.normal(0, 0.15, found.shape) * objects[near][:, [2, 3, 2, 3]] * (r.random((len(found), 1)) < 0.7)
            )
            found = objects[near] + shift
            found[:, 2:] = found[:, 2:].clip(0)
            labels = np.where(r.random(len(found)) < 0.8, classes[near], labels)
        scores = r.integers(-1, 4, len(found)) / 4 if has_ties else r.random(len(found))
        for k, box in enumerate(found.tolist()):
            category = categories[labels[k]].id if r.random() > 0.02 else "unlisted"
            detections.append(Detection(image.id, category, tuple(box), float(scores[k])))
    if r.random() < 0.5:
        detections = [detections[i] for i in r.permutation(len(detections))]
        annotations = [annotations[i] for i in r.permutation(len(annotations))]
    return CocoAnnotations(Path("t.json"), tuple(images), tuple(annotations), tuple(categories)), detections


@pytest.fixture(scope="session")
def random_set() -> Callable[[int], tuple[CocoAnnotations, list[Detection]]]:
    """Ground truth and detections of a seed."""
    return _random_set
