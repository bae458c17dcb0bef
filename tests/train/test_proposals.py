"""More than one proposal for each object in the first stage."""

from __future__ import annotations

import pytest
import torch

from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.presets import DEFORMABLE_DETR
from ddetr_cli.train.criterion import Criterion
from ddetr_cli.train.matcher import Target


def _output() -> tuple[DetectorOutput, torch.Tensor]:
    """One query, and four proposals of which the first two are equally good and the others far away."""
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.9, 0.1, 0.1, 0.1], [0.1, 0.9, 0.1, 0.1]]])
    boxes.requires_grad_()
    out = DetectorOutput(torch.zeros(1, 1, 2), torch.full((1, 1, 4), 0.3))
    out.proposals = (torch.zeros(1, 4, 2), boxes)
    return out, boxes


def test_an_object_teaches_as_many_proposals_as_asked_and_weighs_the_same() -> None:
    target = [Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.3, 0.2]]))]
    taught, terms = {}, {}
    for matches in (1, 2):
        out, boxes = _output()
        total, terms[matches] = Criterion(DEFORMABLE_DETR, proposal_matches=matches)(out, target)
        total.backward()
        assert boxes.grad is not None
        taught[matches] = boxes.grad.abs().sum(-1)[0] > 0
    assert taught[1].sum() == 1 and taught[2].tolist() == [True, True, False, False]
    for name in ("loss_bbox_enc", "loss_giou_enc", "loss_bbox", "loss_ce"):
        assert terms[2][name].item() == pytest.approx(terms[1][name].item()), name


def test_more_objects_than_proposals_is_no_failure() -> None:
    boxes = torch.rand(3, 4) * 0.3 + 0.2
    out, _ = _output()
    total, _ = Criterion(DEFORMABLE_DETR, proposal_matches=5)(out, [Target(torch.zeros(3, dtype=torch.long), boxes)])
    assert torch.isfinite(total)
