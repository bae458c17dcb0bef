"""The numbers a run judges its epochs by: its val split, shared out among the processes and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch

from ddetr_cli.classes import ClassTable
from ddetr_cli.distributed import Ranks
from ddetr_cli.evaluate.mapping import ClassMapping
from ddetr_cli.evaluate.metrics import CocoMetrics, evaluate_detections
from ddetr_cli.evaluate.run import ImageResult, predict_images
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.model.detector import DetectionModel
from ddetr_cli.presets import ModelConfig
from ddetr_cli.train.splits import Split

BATCH = 8


@dataclass(frozen=True)
class InMemoryModel:
    """The model being trained, as the predictor wants it."""

    model: DetectionModel
    config: ModelConfig
    classes: ClassTable


@dataclass(frozen=True)
class Validation:
    """What an epoch's model finds in the val split: the numbers, and the results in the order of its images.

    Every process has the numbers; the results are those of the main one, and empty elsewhere.
    """

    metrics: CocoMetrics
    results: tuple[ImageResult, ...]


def validate(
    model: InMemoryModel,
    val: Split,
    mapping: ClassMapping,
    *,
    device: torch.device,
    precision: Literal["fp32", "bf16"],
    ranks: Ranks,
    should_stop: Callable[[], bool],
) -> Validation | None:
    """Score ``model``, in evaluation mode, on ``val``; None where ``should_stop`` anywhere before the end.

    Each process takes every n-th image; the numbers are those one process would give. Raises DatasetError.
    """
    images = val.annotations.images
    mine = val.annotations.subset(images[ranks.index :: ranks.count])
    predictor = Predictor(model, device=device, precision=precision)
    found = predict_images(predictor, mine, val.images, mapping, batch_size=BATCH, map_missing="drop")
    results: list[ImageResult] = []
    most = -(-len(images) // ranks.count)  # what the process with the most has to do: all stop together
    for _ in range(0, most, BATCH):
        if ranks.total([should_stop()])[0]:
            return None
        results += islice(found, BATCH)
    merged = tuple(_in_turn(ranks.gather(results)))
    metrics = None
    if ranks.is_main:
        metrics = evaluate_detections(val.annotations, [d for result in merged for d in result.detections])
    metrics = ranks.from_main(metrics)
    if metrics is None:
        raise ValueError("the main process sent no numbers")
    return Validation(metrics, merged if ranks.is_main else ())


def _in_turn(shares: list[list[ImageResult]]) -> Iterator[ImageResult]:
    """The shares of all processes back in one order: the first of each, the second of each, ..."""
    for position in range(len(shares[0])):
        yield from (share[position] for share in shares if position < len(share))
