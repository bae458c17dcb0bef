"""Bipartite matching of predictions to objects. Source: arXiv:2005.12872, section 3.1.

# B batch, Q queries, K outputs of the class head, T objects of one image
The families differ in the cost of a class: DETR's is that paper's, Deformable DETR's follows its focal loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ddetr_cli.boxes import cxcywh_to_xyxy, generalized_iou

_WORST = 1e9  # far above any cost, and finite: the assignment takes no other numbers

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # arXiv:1708.02002; the authors hard-code both


@dataclass(frozen=True)
class Target:
    """What one image holds: labels (T,) class indices, boxes_cxcywh (T,4) in [0,1]."""

    labels: Tensor
    boxes_cxcywh: Tensor

    def to(self, device: torch.device) -> Target:
        """The same on another device."""
        return Target(self.labels.to(device, non_blocking=True), self.boxes_cxcywh.to(device, non_blocking=True))


def focal_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Deformable DETR's class cost (Q,T) of logits (Q,K) for objects of classes (T,)."""
    p = logits.sigmoid()[:, labels]
    positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -(p + 1e-8).log()
    negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -(1 - p + 1e-8).log()
    return positive - negative


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """DETR's class cost (Q,T) of logits (Q,K) for objects of classes (T,)."""
    return -logits.softmax(-1)[:, labels]


@dataclass(frozen=True)
class MatchCost:
    """The class cost, and the weights of the three costs."""

    class_cost: Callable[[Tensor, Tensor], Tensor]  # logits (Q,K), labels (T,) -> (Q,T)
    classes: float
    l1: float = 5.0
    giou: float = 2.0


@torch.no_grad()
def match(
    layers: Sequence[tuple[Tensor, Tensor]], targets: Sequence[Sequence[Target]], cost: MatchCost
) -> list[list[tuple[Tensor, Tensor]]]:
    """For each layer and image the matched (query indices, object indices), each (min(Q,T),), on the CPU.

    ``layers`` holds (logits (B,Q,K), boxes_cxcywh (B,Q,4)) pairs, and ``targets`` what each of them is to find; Q and
    T may differ between layers. All cost matrices cross to the host in one copy. A cost that is not finite counts as
    the worst, so that a diverging step still matches, and is warned of.
    """
    costs = [
        _cost_matrix(logits[b], boxes[b], target, cost)
        for (logits, boxes), wanted in zip(layers, targets, strict=True)
        for b, target in enumerate(wanted)
    ]
    host = torch.cat([c.flatten() for c in costs]).cpu().numpy() if costs else np.empty(0)
    if not np.isfinite(host).all():
        _warn(layers)
        host = np.nan_to_num(host, nan=_WORST, posinf=_WORST, neginf=_WORST)
    found, start = [], 0
    for matrix in costs:
        block = host[start : start + matrix.numel()].reshape(matrix.shape)
        start += matrix.numel()
        queries, objects = linear_sum_assignment(block)
        found.append((torch.from_numpy(queries), torch.from_numpy(objects)))
    pairs = iter(found)
    return [list(islice(pairs, len(wanted))) for wanted in targets]


def _warn(layers: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Say which predictions made costs that are not finite. Python shows each of the few sentences once."""
    names = [
        name
        for name, tensors in zip(("logits", "boxes"), zip(*layers, strict=True), strict=True)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors)
    ]
    warnings.warn(
        f"ddetr: matching: {' and '.join(names) or 'costs'} of the model are not finite numbers (NaN or infinite); "
        "the queries concerned count as the worst matches. A step whose loss is not finite changes nothing; if many "
        "follow, lower --learning-rate.",
        RuntimeWarning,
        stacklevel=3,
    )


def _cost_matrix(logits: Tensor, boxes_cxcywh: Tensor, target: Target, cost: MatchCost) -> Tensor:
    """Cost (Q,T) of giving each object to each query of one image."""
    dtype = torch.promote_types(boxes_cxcywh.dtype, torch.float32)
    boxes, wanted = boxes_cxcywh.to(dtype), target.boxes_cxcywh.to(dtype)
    classes = cost.class_cost(logits.to(dtype), target.labels)
    l1 = torch.cdist(boxes, wanted, p=1)
    giou = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return cost.l1 * l1 + cost.classes * classes - cost.giou * giou
