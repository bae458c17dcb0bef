"""The losses: classification, L1 and generalised IoU, for every decoder layer and the proposals.

# N layers, B batch, Q queries, K outputs of the class head, P matched pairs of one layer
What the two families do differently is OBJECTIVES; all else they share. The layers of the decoder are computed
together: on a GPU their number would multiply that of the launches.
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
from ddetr_cli.train.matcher import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    MatchCost,
    Objects,
    Stage,
    Target,
    focal_cost,
    match,
    softmax_cost,
)
from ddetr_cli.transfer import upload

NO_OBJECT_WEIGHT = 0.1  # in DETR's cross entropy, where most queries have no object (arXiv:2005.12872, appendix A.4)

Pairs = tuple[Tensor, Tensor, Tensor]  # layers, images and queries, each (N,P): an index into (N,B,Q,...)


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sigmoid focal loss (...) of logits (...) against 0/1 targets of the same shape (arXiv:1708.02002)."""
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    p_wanted = p * wanted + (1 - p) * (1 - wanted)
    alpha = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
    return alpha * (1 - p_wanted) ** FOCAL_GAMMA * cross_entropy


def paired_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU (...) of boxes (...,4) taken pair by pair."""
    a_size = a_xyxy[..., 2:] - a_xyxy[..., :2]
    b_size = b_xyxy[..., 2:] - b_xyxy[..., :2]
    overlap = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    union = a_size.prod(-1) + b_size.prod(-1) - intersection
    hull = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    hull_area = hull.prod(-1)
    return intersection / union - (hull_area - union) / hull_area


def focal_classes(logits: Tensor, pairs: Pairs, labels: Tensor, num_boxes: float) -> Tensor:
    """Deformable DETR's class loss: focal over all queries and classes, per object."""
    one_hot = torch.zeros_like(logits)
    one_hot[(*pairs, labels)] = 1.0
    return focal_loss(logits, one_hot).sum((1, 2, 3)) / num_boxes


def softmax_classes(logits: Tensor, pairs: Pairs, labels: Tensor, num_boxes: float) -> Tensor:
    """DETR's class loss: the weighted mean of the queries' cross entropies; ``num_boxes`` plays no part."""
    no_object = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:3], no_object, dtype=torch.long, device=logits.device)
    wanted[pairs] = labels
    weights = logits.new_ones(logits.shape[-1])
    weights[no_object] = NO_OBJECT_WEIGHT
    weighted = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weights, reduction="none")
    return weighted.view_as(wanted).sum((1, 2)) / weights[wanted].sum((1, 2))


@dataclass(frozen=True)
class Objective:
    """What a family minimises: its class loss, the cost of a match, and the weights of the losses of every layer."""

    class_loss: Callable[[Tensor, Pairs, Tensor, float], Tensor]  # logits (N,B,Q,K), pairs, labels (N,P), num_boxes
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
    of the first stage are divided by it. ``waited_seconds``: for how long the last call waited for the device.
    """

    def __init__(self, family: str, *, proposal_matches: int = 1) -> None:
        self.objective, self.proposal_matches = OBJECTIVES[family], proposal_matches
        self.waited_seconds = 0.0

    def __call__(
        self, output: DetectorOutput, targets: Sequence[Target], num_boxes: float | None = None, *, share: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total to minimise, and every term by the authors' name (``loss_ce``, ``loss_bbox_0``, ...).

        Terms are unweighted and, but for DETR's ``loss_ce``, divided by ``num_boxes``: the objects of the batch, at
        least 1 (the caller passes those of the whole step, the mean over processes). ``share`` is the part of the
        step's images that are in this pass: DETR's ``loss_ce`` is a mean over the pass, and weighed by it.
        """
        if len(targets) != len(output.logits):
            raise ValueError(f"{len(targets)} targets for {len(output.logits)} images")
        if num_boxes is None:
            num_boxes = max(sum(len(t.labels) for t in targets), 1)
        objects = Objects.of(targets, output.logits.device)
        logits, boxes = zip((output.logits, output.boxes_cxcywh), *output.aux, strict=True)
        stages = [Stage(torch.stack(logits), torch.stack(boxes), objects)]
        names = ["", *(f"_{i}" for i in range(len(output.aux)))]
        if output.proposals is not None:
            # The first stage only learns object or not: every label becomes class 0.
            first_logits, first_boxes = output.proposals
            stages.append(Stage(first_logits[None], first_boxes[None], objects.of_one_class(), self.proposal_matches))
            names.append("_enc")
        matching = match(stages, self.objective.cost)
        self.waited_seconds = matching.waited_seconds
        found = [
            self._losses(stage, pairs, num_boxes * stage.copies)
            for stage, pairs in zip(stages, _to_device(matching.pairs, output.logits.device), strict=True)
        ]
        ce, l1, giou = (torch.cat(of_stages) for of_stages in zip(*found, strict=True))
        if self.objective.is_class_mean:
            ce = ce * share
        total = (self.objective.classes * ce + self.objective.l1 * l1 + self.objective.giou * giou).sum()
        terms: dict[str, Tensor] = {}
        for name, *values in zip(names, ce, l1, giou, strict=True):
            terms |= {f"loss_{kind}{name}": value for kind, value in zip(("ce", "bbox", "giou"), values, strict=True)}
        return total, terms

    def _losses(self, stage: Stage, pairs: Tensor, num_boxes: float) -> tuple[Tensor, Tensor, Tensor]:
        """Class, L1 and GIoU loss of every layer, each (N,), for pairs (4,N,P): layer, image, query and object."""
        layer, image, query, found = pairs
        boxes = stage.boxes_cxcywh
        wanted = stage.objects.boxes_cxcywh[image, found].to(boxes.dtype)
        wide = stage.logits.to(torch.promote_types(stage.logits.dtype, torch.float32))
        ce = self.objective.class_loss(wide, (layer, image, query), stage.objects.labels[image, found], num_boxes)
        chosen = boxes[layer, image, query]
        l1 = (chosen - wanted).abs().sum((1, 2)) / num_boxes
        giou = (1 - paired_giou(cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(wanted))).sum(1) / num_boxes
        return ce, l1, giou


def _to_device(pairs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors (4,N,P) on ``device``, in one copy."""
    moved = upload(torch.cat([of_stage.flatten(1) for of_stage in pairs], dim=1), device)
    parts = moved.split([of_stage[0].numel() for of_stage in pairs], dim=1)
    return [part.view(of_stage.shape) for part, of_stage in zip(parts, pairs, strict=True)]
