"""A model's detections over the images of a data set, image by image, in the data set's categories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ddetr_cli.boxes import xyxy_to_xywh
from ddetr_cli.data.coco import CocoAnnotations, CocoImage, read_dataset_image
from ddetr_cli.errors import DatasetError, DeviceError, ImageError
from ddetr_cli.evaluate.mapping import ClassMapping, MapMissing
from ddetr_cli.evaluate.table import Detection
from ddetr_cli.inference.ahead import helper_threads, map_ahead
from ddetr_cli.inference.preparation import Prepared


class Boxes(Protocol):
    """What a predictor gives of one image: (N,4) pixels, (N,) scores and class indices, all finite.

    ``dropped`` rows were not finite and are not among the N.
    """

    @property
    def boxes_xyxy_px(self) -> Tensor: ...
    @property
    def scores(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def dropped(self) -> int: ...


class PredictsBoxes(Protocol):
    """The part of ``inference.predictor.Predictor`` used here."""

    @property
    def device(self) -> torch.device: ...
    @property
    def prepare(self) -> Callable[[Image.Image], Prepared]: ...
    def predict_prepared(self, images: Sequence[Prepared]) -> Sequence[Boxes | DeviceError]: ...


@dataclass(frozen=True)
class ImageResult:
    """The detections of one image, best first, and how many were left out: of no category, or not finite."""

    image: CocoImage
    detections: list[Detection]
    unmapped: int = 0
    non_finite: int = 0


def predict_images(
    predictor: PredictsBoxes,
    annotations: CocoAnnotations,
    root: Path,
    mapping: ClassMapping,
    *,
    batch_size: int = 1,
    map_missing: MapMissing = "error",
) -> Iterator[ImageResult]:
    """One ``ImageResult`` per image of ``annotations``, in its order; about ``batch_size`` images are held at a time.

    COCO's pictures are read as stored, without turning them by EXIF, while the model works on those before. Raises
    DatasetError for an unreadable image (a score over the rest would be another data set's) and, unless
    ``map_missing`` is "drop", for a predicted class without counterpart; DeviceError.
    """

    def read(image: CocoImage) -> tuple[CocoImage, Prepared]:
        try:
            return image, predictor.prepare(read_dataset_image(root, image))
        except ImageError as error:
            raise DatasetError(f"{error} (image {image.id!r} of the data set)") from error

    threads = helper_threads(predictor.device.type)
    with ThreadPoolExecutor(threads, thread_name_prefix="ddetr") as pool:
        ready = map_ahead(pool, read, annotations.images, max(threads, batch_size))
        while batch := list(islice(ready, batch_size)):
            found = predictor.predict_prepared([prepared for _, prepared in batch])
            for (image, _), boxes in zip(batch, found, strict=True):
                if isinstance(boxes, DeviceError):
                    raise boxes
                yield _result(image, boxes, mapping, map_missing)


def _result(image: CocoImage, boxes: Boxes, mapping: ClassMapping, map_missing: MapMissing) -> ImageResult:
    detections: list[Detection] = []
    unmapped = 0
    # Corner to size in the boxes' own float32, as the authors' evaluation does it.
    bbox_xywh = xyxy_to_xywh(boxes.boxes_xyxy_px).tolist()
    for (x, y, w, h), score, label in zip(bbox_xywh, boxes.scores.tolist(), boxes.labels.tolist(), strict=True):
        category_id = mapping.category_ids[label]
        if category_id is None:
            if map_missing == "error":
                mapping.require(label)
            unmapped += 1
            continue
        detections.append(Detection(image.id, category_id, (x, y, w, h), score))
    return ImageResult(image, detections, unmapped, boxes.dropped)
