"""The losses: focal classification, L1 and generalised IoU, for every decoder layer and the proposals.

# B batch, Q queries, K classes, T objects of one image
Source: arXiv:2010.04159, appendix A.4, and the authors' SetCriterion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddetr_cli.boxes import cxcywh_to_xyxy
from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.train.matcher import FOCAL_ALPHA, FOCAL_GAMMA, MatchCost, Target, match


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three losses in the total; the same for every layer."""

    classes: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sigmoid focal loss, summed, of logits (...) against 0/1 targets of the same shape (arXiv:1708.02002)."""
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    p_wanted = p * wanted + (1 - p) * (1 - wanted)
    alpha = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
    return (alpha * (1 - p_wanted) ** FOCAL_GAMMA * cross_entropy).sum()


def paired_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU (N,) of boxes (N,4) taken pair by pair."""
    a_size = a_xyxy[:, 2:] - a_xyxy[:, :2]
    b_size = b_xyxy[:, 2:] - b_xyxy[:, :2]
    overlap = torch.minimum(a_xyxy[:, 2:], b_xyxy[:, 2:]) - torch.maximum(a_xyxy[:, :2], b_xyxy[:, :2])
    intersection = overlap.clamp(min=0).prod(-1)
    union = a_size.prod(-1) + b_size.prod(-1) - intersection
    hull = (torch.maximum(a_xyxy[:, 2:], b_xyxy[:, 2:]) - torch.minimum(a_xyxy[:, :2], b_xyxy[:, :2])).prod(-1)
    return intersection / union - (hull - union) / hull


class Criterion:
    """Matches predictions to objects and sums the weighted losses."""

    def __init__(self, weights: LossWeights = LossWeights(), cost: MatchCost = MatchCost()) -> None:
        self.weights, self.cost = weights, cost

    def __call__(
        self, output: DetectorOutput, targets: Sequence[Target], num_boxes: float | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total to minimise, and every term by the authors' name (``loss_ce``, ``loss_bbox_0``, ...).

        Terms are unweighted and divided by ``num_boxes``: the objects of the batch, at least 1 (the caller passes the
        mean over processes where there are several).
        """
        if num_boxes is None:
            num_boxes = max(sum(len(t.labels) for t in targets), 1)
        layers = [(output.logits, output.boxes_cxcywh), *output.aux]
        names = ["", *(f"_{i}" for i in range(len(output.aux)))]
        matches = match(layers, targets, self.cost)
        wanted = [list(targets)] * len(layers)
        if output.proposals is not None:
            # The first stage only learns object or not: every label becomes class 0.
            binary = [Target(torch.zeros_like(t.labels), t.boxes_cxcywh) for t in targets]
            layers.append(output.proposals)
            names.append("_enc")
            matches += match([output.proposals], binary, self.cost)
            wanted.append(binary)
        terms: dict[str, Tensor] = {}
        total = layers[0][0].new_zeros((), dtype=torch.promote_types(output.boxes_cxcywh.dtype, torch.float32))
        for (logits, boxes), name, matched, objects in zip(layers, names, matches, wanted, strict=True):
            ce, l1, giou = _layer_losses(logits, boxes, objects, matched)
            for key, value, weight in (
                ("loss_ce", ce, self.weights.classes),
                ("loss_bbox", l1, self.weights.l1),
                ("loss_giou", giou, self.weights.giou),
            ):
                terms[key + name] = value / num_boxes
                total = total + weight * terms[key + name]
        return total, terms


def _layer_losses(
    logits: Tensor, boxes_cxcywh: Tensor, targets: Sequence[Target], matched: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Focal, L1 and GIoU sums of one layer."""
    device = logits.device
    image = torch.cat([torch.full_like(q, b) for b, (q, _) in enumerate(matched)]).to(device, non_blocking=True)
    query = torch.cat([q for q, _ in matched]).to(device, non_blocking=True)
    order = [o.to(device, non_blocking=True) for _, o in matched]
    labels = torch.cat([t.labels[o] for t, o in zip(targets, order, strict=True)])
    wanted = torch.cat([t.boxes_cxcywh[o] for t, o in zip(targets, order, strict=True)]).to(boxes_cxcywh.dtype)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    one_hot = torch.zeros(logits.shape, dtype=dtype, device=device)
    one_hot[image, query, labels] = 1.0
    ce = focal_loss(logits.to(dtype), one_hot)
    chosen = boxes_cxcywh[image, query]
    l1 = (chosen - wanted).abs().sum()
    giou = (1 - paired_giou(cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(wanted))).sum()
    return ce, l1, giou
