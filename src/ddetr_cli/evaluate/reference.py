"""The curves of pycocotools itself: slower and larger, and the definition of correct.

It gets its data in memory and with clean ids (1..n, in the order of the original ids, so that equal scores are ranked
as it would rank them); its prints are swallowed.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.evaluate.accumulate import Curves
from ddetr_cli.evaluate.table import DetectionTable, ranks


def pycocotools_curves(ground_truth: CocoAnnotations, table: DetectionTable) -> Curves:
    """What COCOeval makes of a table of ``ground_truth``."""
    image_rank = (ranks([image.id for image in ground_truth.images]) + 1).tolist()
    class_rank = (ranks([category.id for category in ground_truth.categories]) + 1).tolist()
    image_at = {image.id: rank for image, rank in zip(ground_truth.images, image_rank, strict=True)}
    class_at = {category.id: rank for category, rank in zip(ground_truth.categories, class_rank, strict=True)}
    images = [{"id": rank} for rank in image_rank]
    categories = [{"id": rank} for rank in class_rank]
    truth = [
        {
            "id": index + 1,
            "image_id": image_at[annotation.image_id],
            "category_id": class_at[annotation.category_id],
            "bbox": list(annotation.bbox_xywh),
            "area": annotation.area,
            "iscrowd": int(annotation.iscrowd),
        }
        for index, annotation in enumerate(ground_truth.annotations)
    ]
    results = [
        {
            "id": index + 1,
            "image_id": image_at[detection.image_id],
            "category_id": class_at[detection.category_id],
            "bbox": list(detection.bbox_xywh),
            "area": detection.bbox_xywh[2] * detection.bbox_xywh[3],
            "iscrowd": 0,
            "score": detection.score,
        }
        for index, detection in enumerate(table.rows(table.category < len(class_rank)))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(images, categories, truth), _coco(images, categories, results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    found = evaluation.eval
    return Curves(
        np.ascontiguousarray(found["precision"][..., -1]),
        found["recall"],
        np.ascontiguousarray(found["scores"][..., -1]),
    )


def _coco(images: list[dict[str, Any]], categories: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco
