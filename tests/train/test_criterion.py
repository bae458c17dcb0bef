from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.train.criterion import Criterion, focal_loss, paired_giou
from ddetr_cli.train.matcher import Target, match

GOLDEN = Path(__file__).parents[1] / "golden" / "criterion.npz"


@pytest.fixture(scope="module")
def authors() -> dict[str, Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}


def _targets(numbers: dict[str, Tensor]) -> list[Target]:
    return [Target(numbers[f"target{i}_labels"], numbers[f"target{i}_boxes"].reshape(-1, 4)) for i in range(3)]


def _output(numbers: dict[str, Tensor]) -> tuple[DetectorOutput, dict[str, tuple[Tensor, Tensor]]]:
    """The authors' three layers and encoder, as leaves; layer 2 is the last."""
    pairs = {
        name: (numbers[f"{name}_logits"].clone().requires_grad_(), numbers[f"{name}_boxes"].clone().requires_grad_())
        for name in ("layer0", "layer1", "layer2", "enc")
    }
    output = DetectorOutput(*pairs["layer2"], aux=[pairs["layer0"], pairs["layer1"]], proposals=pairs["enc"])
    return output, pairs


def test_matches_are_the_authors(authors: dict[str, Tensor]) -> None:
    _, pairs = _output(authors)
    targets = _targets(authors)
    binary = [Target(torch.zeros_like(t.labels), t.boxes_cxcywh) for t in targets]
    for name, pair in pairs.items():
        (found,) = match([pair], binary if name == "enc" else targets)
        for image, (queries, objects) in enumerate(found):
            wanted = authors[f"{name}_match{image}"]
            order = objects.argsort()
            wanted_order = wanted[1].argsort()
            assert torch.equal(queries[order], wanted[0][wanted_order])
            assert torch.equal(objects[order], wanted[1][wanted_order])


def test_every_loss_and_the_total_are_the_authors(authors: dict[str, Tensor]) -> None:
    output, _ = _output(authors)
    total, terms = Criterion()(output, _targets(authors))
    torch.testing.assert_close(total, authors["total"], rtol=1e-9, atol=1e-9)
    expected = {name.removeprefix("loss/"): t for name, t in authors.items() if name.startswith("loss/loss_")}
    assert set(terms) == set(expected)
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


def test_gradients_of_the_total_are_the_authors(authors: dict[str, Tensor]) -> None:
    output, pairs = _output(authors)
    total, _ = Criterion()(output, _targets(authors))
    total.backward()
    for name, (logits, boxes) in pairs.items():
        torch.testing.assert_close(logits.grad, authors[f"{name}_grad_logits"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(boxes.grad, authors[f"{name}_grad_boxes"], rtol=1e-9, atol=1e-9)


def test_a_batch_without_objects_has_a_finite_loss_and_pushes_scores_down() -> None:
    logits = torch.zeros(2, 5, 3, requires_grad=True)
    boxes = torch.full((2, 5, 4), 0.5, requires_grad=True)
    empty = Target(torch.empty(0, dtype=torch.long), torch.empty(0, 4))
    total, terms = Criterion()(DetectorOutput(logits, boxes), [empty, empty])
    total.backward()
    assert torch.isfinite(total)
    assert terms["loss_bbox"] == 0 and terms["loss_giou"] == 0
    assert (logits.grad > 0).all()


def test_more_objects_than_queries_match_every_query_once() -> None:
    boxes = torch.rand(1, 4, 4) * 0.5 + 0.2
    target = Target(torch.zeros(9, dtype=torch.long), torch.rand(9, 4) * 0.5 + 0.2)
    ((pair,),) = match([(torch.zeros(1, 4, 2), boxes)], [target])
    assert sorted(pair[0].tolist()) == [0, 1, 2, 3]
    assert len(set(pair[1].tolist())) == 4


def test_a_cost_that_is_not_finite_still_matches() -> None:
    logits = torch.zeros(1, 3, 2)
    boxes = torch.full((1, 3, 4), 0.5)
    boxes[0, 0] = float("nan")
    logits[0, 1] = float("nan")
    target = Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    (((queries, objects),),) = match([(logits, boxes)], [target])
    assert queries.tolist() == [2] and objects.tolist() == [0]


def test_focal_loss_of_an_even_guess_is_a_quarter_of_the_weighted_cross_entropy() -> None:
    # p = 1/2: alpha * (1/2)^2 * ln 2 for a positive, (1 - alpha) * (1/2)^2 * ln 2 for a negative.
    loss = focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx((0.25 + 0.75) * 0.25 * np.log(2), rel=1e-6)


def test_giou_of_a_box_with_itself_is_one_and_of_distant_boxes_is_negative() -> None:
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
    # Second pair: no overlap, union 2, hull 4.
    assert paired_giou(a, b).tolist() == pytest.approx([1.0, -0.5])
