"""Bipartite matching of predictions to objects. Source: arXiv:2005.12872, section 3.1.

# N layers, B batch, Q queries, K outputs of the class head, T objects of the fullest image, P pairs of one layer
The families differ in the cost of a class: DETR's is that paper's, Deformable DETR's follows its focal loss. All
layers and images are one computation and one copy to the host: a GPU waits for the matching, once a pass.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ddetr_cli.boxes import cxcywh_to_xyxy, generalized_iou
from ddetr_cli.transfer import upload

_WORST = 1e9  # far above any cost, and finite: the assignment takes no other numbers

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # arXiv:1708.02002; the authors hard-code both
# Costs that are computed at once: the proposals of crowded images in parts, for the sake of memory.
MOST_COSTS = 1 << 23


@dataclass(frozen=True)
class Target:
    """What one image holds: labels (T,) class indices, boxes_cxcywh (T,4) in [0,1]; on the CPU."""

    labels: Tensor
    boxes_cxcywh: Tensor


@dataclass(frozen=True)
class Objects:
    """What the images of a batch hold: labels (B,T), boxes_cxcywh (B,T,4), of which ``counts`` are an image's own."""

    counts: list[int]
    labels: Tensor
    boxes_cxcywh: Tensor

    @classmethod
    def of(cls, targets: Sequence[Target], device: torch.device) -> Objects:
        """Those of ``targets`` on ``device``, in one copy; zeros where an image has fewer than the fullest."""
        counts = [len(target.labels) for target in targets]
        # Class indices are exact in floats up to 2^24.
        rows = torch.zeros(len(targets), max(counts), 5, dtype=targets[0].boxes_cxcywh.dtype)
        for row, count, target in zip(rows, counts, targets, strict=True):
            row[:count, 0], row[:count, 1:] = target.labels, target.boxes_cxcywh
        rows = upload(rows, device)
        return cls(counts, rows[..., 0].long(), rows[..., 1:])

    def of_one_class(self) -> Objects:
        """The same objects, all of class 0."""
        return replace(self, labels=torch.zeros_like(self.labels))


@dataclass(frozen=True)
class Stage:
    """Layers of equal shape that look for the same objects, each of which ``copies`` queries are to find.

    logits (N,B,Q,K), boxes_cxcywh (N,B,Q,4).
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    objects: Objects
    copies: int = 1


def focal_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Deformable DETR's class cost (N,B,T,Q) of logits (N,B,Q,K) for objects of classes (B,T)."""
    p = _of_classes(logits, labels).sigmoid()
    positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -(p + 1e-8).log()
    negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -(1 - p + 1e-8).log()
    return positive - negative


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """DETR's class cost (N,B,T,Q) of logits (N,B,Q,K) for objects of classes (B,T)."""
    return -_of_classes(logits.softmax(-1), labels)


def _of_classes(x: Tensor, labels: Tensor) -> Tensor:
    """(N,B,T,Q): of x (N,B,Q,K) the columns that ``labels`` (B,T) name."""
    N, B, Q, _ = x.shape
    return x.transpose(2, 3).gather(2, labels[None, :, :, None].expand(N, B, -1, Q))


@dataclass(frozen=True)
class MatchCost:
    """The class cost, and the weights of the three costs."""

    class_cost: Callable[[Tensor, Tensor], Tensor]  # logits (N,B,Q,K), labels (B,T) -> (N,B,T,Q)
    classes: float
    l1: float = 5.0
    giou: float = 2.0


@dataclass(frozen=True)
class Matching:
    """For each stage (4,N,P) on the CPU: layer, image, query and object; and how long the device was waited for."""

    pairs: list[Tensor]
    waited_seconds: float


@torch.no_grad()
def match(stages: Sequence[Stage], cost: MatchCost) -> Matching:
    """For each layer and image the min(Q, copies * T) cheapest pairs of query and object.

    A cost that is not finite counts as the worst, so that a diverging step still matches, and is warned of.
    """
    costs = [_costs(stage, cost) for stage in stages]
    start = time.perf_counter()
    host = torch.cat([part.flatten() for parts in costs for part in parts]).cpu().numpy()
    waited = time.perf_counter() - start
    pairs, first, is_finite = [], 0, True
    for stage, parts in zip(stages, costs, strict=True):
        size = sum(part.numel() for part in parts)
        found: list[list[NDArray[np.int64]]] = [[] for _ in range(len(stage.logits))]
        for layer, image, of_image in _each_image(stage, host[first : first + size]):
            if not np.isfinite(of_image).all():
                is_finite = False
                of_image = np.nan_to_num(of_image, nan=_WORST, posinf=_WORST, neginf=_WORST)
            queries, objects = _assign(of_image, stage.copies)
            place = np.full_like(queries, layer), np.full_like(queries, image)
            found[layer].append(np.stack((*place, queries, objects)))
        pairs.append(torch.from_numpy(np.stack([np.concatenate(rows, axis=1) for rows in found], axis=1)))
        first += size
    if not is_finite:
        _warn(stages)
    return Matching(pairs, waited)


def _each_image(
    stage: Stage, costs: NDArray[np.floating[Any]]
) -> Iterator[tuple[int, int, NDArray[np.floating[Any]]]]:
    """Layer, image and costs (T,Q) of the image's own T objects, from what ``_costs`` gave of ``stage``, flat."""
    N, _, Q, _ = stage.logits.shape
    T, first = stage.objects.labels.shape[1], 0
    for images in _portions(stage):
        size = N * len(images) * T * Q
        block = costs[first : first + size].reshape(N, len(images), T, Q)
        first += size
        for layer, of_layer in enumerate(block):
            for image, of_image in zip(images, of_layer, strict=True):
                yield layer, image, of_image[: stage.objects.counts[image]]


def _assign(costs: NDArray[np.floating[Any]], copies: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Queries and objects of the cheapest pairs by ``costs`` (T,Q), of each object up to ``copies``.

    The rows are repeated as a whole, so that row r of what is assigned is object r modulo T.
    """
    rows, queries = linear_sum_assignment(np.tile(costs, (copies, 1)))
    return queries, rows % max(len(costs), 1)


def _warn(stages: Sequence[Stage]) -> None:
    """Say which predictions made costs that are not finite. Python shows each of the few sentences once."""
    names = [
        name
        for name, tensors in (("logits", [s.logits for s in stages]), ("boxes", [s.boxes_cxcywh for s in stages]))
        if not all(bool(tensor.isfinite().all()) for tensor in tensors)
    ]
    warnings.warn(
        f"ddetr: matching: {' and '.join(names) or 'costs'} of the model are not finite numbers (NaN or infinite); "
        "the queries concerned count as the worst matches. A step whose loss is not finite changes nothing; if many "
        "follow, lower --learning-rate.",
        RuntimeWarning,
        stacklevel=3,
    )


def _portions(stage: Stage) -> list[range]:
    """The images of ``stage``, as many at a time as MOST_COSTS allows."""
    N, B, Q, _ = stage.logits.shape
    count = max(1, MOST_COSTS // max(1, N * stage.objects.labels.shape[1] * Q))
    return [range(b, min(b + count, B)) for b in range(0, B, count)]


def _costs(stage: Stage, cost: MatchCost) -> list[Tensor]:
    """Cost (N,b,T,Q) of giving each object to each query, for the b images of every portion."""
    dtype = torch.promote_types(stage.boxes_cxcywh.dtype, torch.float32)
    costs = []
    for images in _portions(stage):
        here = slice(images.start, images.stop)
        boxes, wanted = stage.boxes_cxcywh[:, here].to(dtype), stage.objects.boxes_cxcywh[here].to(dtype)
        classes = cost.class_cost(stage.logits[:, here].to(dtype), stage.objects.labels[here])
        l1 = (wanted[:, :, None] - boxes[:, :, None]).abs().sum(-1)
        giou = generalized_iou(cxcywh_to_xyxy(wanted), cxcywh_to_xyxy(boxes))
        costs.append(cost.l1 * l1 + cost.classes * classes - cost.giou * giou)
    return costs
