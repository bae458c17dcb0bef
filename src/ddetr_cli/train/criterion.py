"""The losses: classification, L1 and generalised IoU, for every decoder layer and the proposals.

# B batch, Q queries, K outputs of the class head, N matched pairs, T objects of one image
What the two families do differently is OBJECTIVES; all else they share.
Sources: arXiv:2005.12872, section 3.1; arXiv:2010.04159, appendix A.4; both authors' SetCriterion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddetr_cli.boxes import cxcywh_to_xyxy
from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.presets import DEFORMABLE_DETR, DETR
from ddetr_cli.train.matcher import FOCAL_ALPHA, FOCAL_GAMMA, MatchCost, Target, focal_cost, match, softmax_cost

NO_OBJECT_WEIGHT = 0.1  # in DETR's cross entropy, where most queries have no object (arXiv:2005.12872, appendix A.4)

Pairs = tuple[Tensor, Tensor]  # images (N,) and queries (N,): an index into (B,Q,...)


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


def focal_classes(logits: Tensor, pairs: Pairs, labels: Tensor, num_boxes: float) -> Tensor:
    """Deformable DETR's class loss: focal over all queries and classes, per object."""
    one_hot = torch.zeros_like(logits)
    one_hot[(*pairs, labels)] = 1.0
    return focal_loss(logits, one_hot) / num_boxes


def softmax_classes(logits: Tensor, pairs: Pairs, labels: Tensor, num_boxes: float) -> Tensor:
    """DETR's class loss: the weighted mean of the queries' cross entropies; ``num_boxes`` plays no part."""
    no_object = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:2], no_object, dtype=torch.long, device=logits.device)
    wanted[pairs] = labels
    weights = logits.new_ones(logits.shape[-1])
    weights[no_object] = NO_OBJECT_WEIGHT
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights)


@dataclass(frozen=True)
class Objective:
    """What a family minimises: its class loss, the cost of a match, and the weights of the losses of every layer."""

    class_loss: Callable[[Tensor, Pairs, Tensor, float], Tensor]  # logits (B,Q,K), pairs, labels (N,), num_boxes
    cost: MatchCost
    classes: float
    l1: float = 5.0
    giou: float = 2.0
    is_class_mean: bool = False  # the class loss is a mean over the pass, and not divided by ``num_boxes``


OBJECTIVES: dict[str, Objective] = {
    DEFORMABLE_DETR: Objective(focal_classes, MatchCost(focal_cost, classes=2.0), classes=2.0),
    DETR: Objective(softmax_classes, MatchCost(softmax_cost, classes=1.0), classes=1.0, is_class_mean=True),
}


class Criterion:
    """Matches predictions to objects and sums the weighted losses; ``family`` is a key of OBJECTIVES.

    In two-stage models each object is matched to ``proposal_matches`` proposals (1: the authors' loss), and the terms
    of the first stage are divided by it.
    """

    def __init__(self, family: str, *, proposal_matches: int = 1) -> None:
        self.objective, self.proposal_matches = OBJECTIVES[family], proposal_matches

    def __call__(
        self, output: DetectorOutput, targets: Sequence[Target], num_boxes: float | None = None, *, share: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total to minimise, and every term by the authors' name (``loss_ce``, ``loss_bbox_0``, ...).

        Terms are unweighted and, but for DETR's ``loss_ce``, divided by ``num_boxes``: the objects of the batch, at
        least 1 (the caller passes those of the whole step, the mean over processes). ``share`` is the part of the
        step's images that are in this pass: DETR's ``loss_ce`` is a mean over the pass, and weighed by it.
        """
        if num_boxes is None:
            num_boxes = max(sum(len(t.labels) for t in targets), 1)
        layers = [(output.logits, output.boxes_cxcywh), *output.aux]
        names = ["", *(f"_{i}" for i in range(len(output.aux)))]
        wanted = [list(targets)] * len(layers)
        if output.proposals is not None:
            # The first stage only learns object or not: every label becomes class 0.
            K = self.proposal_matches
            binary = [Target(torch.zeros_like(t.labels).repeat(K), t.boxes_cxcywh.repeat(K, 1)) for t in targets]
            layers.append(output.proposals)
            names.append("_enc")
            wanted.append(binary)
        matches = _to_device(match(layers, wanted, self.objective.cost), wanted, output.logits.device)
        terms: dict[str, Tensor] = {}
        total = layers[0][0].new_zeros((), dtype=torch.promote_types(output.boxes_cxcywh.dtype, torch.float32))
        for (logits, boxes), name, matched, objects in zip(layers, names, matches, wanted, strict=True):
            copies = self.proposal_matches if name == "_enc" else 1
            ce, l1, giou = self._layer(logits, boxes, objects, *matched, num_boxes * copies)
            if self.objective.is_class_mean:
                ce = ce * share
            for key, value, weight in (
                ("loss_ce", ce, self.objective.classes),
                ("loss_bbox", l1, self.objective.l1),
                ("loss_giou", giou, self.objective.giou),
            ):
                terms[key + name] = value
                total = total + weight * value
        return total, terms

    def _layer(
        self,
        logits: Tensor,
        boxes_cxcywh: Tensor,
        targets: Sequence[Target],
        image: Tensor,
        query: Tensor,
        matched: Tensor,
        num_boxes: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Class, L1 and GIoU loss of one layer; image, query, and object among those of all targets, each (N,)."""
        labels = torch.cat([t.labels for t in targets])[matched]
        wanted = torch.cat([t.boxes_cxcywh for t in targets])[matched].to(boxes_cxcywh.dtype)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ce = self.objective.class_loss(wide, (image, query), labels, num_boxes)
        chosen = boxes_cxcywh[image, query]
        l1 = (chosen - wanted).abs().sum() / num_boxes
        giou = (1 - paired_giou(cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(wanted))).sum() / num_boxes
        return ce, l1, giou


def _to_device(
    matches: Sequence[Sequence[tuple[Tensor, Tensor]]], targets: Sequence[Sequence[Target]], device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each layer image, query, and object among those of all its images, each (N,): in one copy to ``device``."""
    rows = []
    for matched, objects in zip(matches, targets, strict=True):
        first = 0
        images, queries, found = [], [], []
        for b, ((q, o), target) in enumerate(zip(matched, objects, strict=True)):
            images.append(torch.full_like(q, b))
            queries.append(q)
            found.append(o + first)
            first += len(target.labels)
        rows.append(torch.stack((torch.cat(images), torch.cat(queries), torch.cat(found))))
    lengths = [row.shape[1] for row in rows]
    moved = torch.cat(rows, dim=1)
    if device.type == "cuda":
        moved = moved.pin_memory()
    return [(layer[0], layer[1], layer[2]) for layer in moved.to(device, non_blocking=True).split(lengths, dim=1)]
