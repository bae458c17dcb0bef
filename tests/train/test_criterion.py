from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.presets import DEFORMABLE_DETR, DETR
from ddetr_cli.train import matcher
from ddetr_cli.train.criterion import OBJECTIVES, Criterion, focal_loss, paired_giou
from ddetr_cli.train.matcher import Objects, Stage, Target, match

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = [DEFORMABLE_DETR, DETR]
CENTRED = Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.5, 0.5]]))


@dataclass
class Case:
    """Three decoder layers of one family (layer 2 is the last), as leaves, and what its authors' criterion says."""

    family: str
    numbers: dict[str, Tensor]
    pairs: dict[str, tuple[Tensor, Tensor]]
    targets: list[Target]

    @property
    def output(self) -> DetectorOutput:
        last, aux = self.pairs["layer2"], [self.pairs["layer0"], self.pairs["layer1"]]
        return DetectorOutput(*last, aux=aux, proposals=self.pairs.get("enc"))


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    numbers = _read("criterion")
    names = ["layer0", "layer1", "layer2"]
    if request.param == DETR:
        # The same logits, boxes and objects, but for labels: the last output means "no object" here.
        numbers |= _read("detr_criterion")
    else:
        names.append("enc")
    pairs = {n: (numbers[f"{n}_logits"].requires_grad_(), numbers[f"{n}_boxes"].requires_grad_()) for n in names}
    targets = [Target(numbers[f"target{i}_labels"], numbers[f"target{i}_boxes"].reshape(-1, 4)) for i in range(3)]
    return Case(request.param, numbers, pairs, targets)


def _read(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def _stages(case: Case) -> list[Stage]:
    objects = Objects.of(case.targets, torch.device("cpu"))
    decoder = [pair for name, pair in case.pairs.items() if name != "enc"]
    stages = [Stage(torch.stack([p[0] for p in decoder]), torch.stack([p[1] for p in decoder]), objects)]
    if "enc" in case.pairs:
        stages.append(Stage(*(x[None] for x in case.pairs["enc"]), objects.of_one_class()))
    return stages


@pytest.mark.parametrize("most_costs", [matcher.MOST_COSTS, 1])
def test_matches_are_the_authors(case: Case, most_costs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "MOST_COSTS", most_costs)
    found = [layer for pairs in match(_stages(case), OBJECTIVES[case.family].cost).pairs for layer in pairs.unbind(1)]
    for name, (_, images, queries, objects) in zip(case.pairs, found, strict=True):
        for image in range(len(case.targets)):
            wanted = case.numbers[f"{name}_match{image}"]
            order, wanted_order = objects[images == image].argsort(), wanted[1].argsort()
            assert torch.equal(queries[images == image][order], wanted[0][wanted_order])
            assert torch.equal(objects[images == image][order], wanted[1][wanted_order])


def test_every_loss_and_the_total_are_the_authors(case: Case) -> None:
    total, terms = Criterion(case.family)(case.output, case.targets)
    torch.testing.assert_close(total, case.numbers["total"], rtol=1e-9, atol=1e-9)
    names = [f"loss_{kind}{layer}" for layer in ("", "_0", "_1", "_enc") for kind in ("ce", "bbox", "giou")]
    assert list(terms) == [name for name in names if case.family != DETR or not name.endswith("_enc")]
    for name, value in terms.items():
        torch.testing.assert_close(value, case.numbers[f"loss/{name}"], rtol=1e-9, atol=1e-9)


def test_gradients_of_the_total_are_the_authors(case: Case) -> None:
    total, _ = Criterion(case.family)(case.output, case.targets)
    total.backward()
    for name, (logits, boxes) in case.pairs.items():
        torch.testing.assert_close(logits.grad, case.numbers[f"{name}_grad_logits"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(boxes.grad, case.numbers[f"{name}_grad_boxes"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_objects_has_a_finite_loss_and_pushes_scores_down(family: str) -> None:
    logits = torch.zeros(2, 5, 3, requires_grad=True)
    boxes = torch.full((2, 5, 4), 0.5, requires_grad=True)
    empty = Target(torch.empty(0, dtype=torch.long), torch.empty(0, 4))
    total, terms = Criterion(family)(DetectorOutput(logits, boxes), [empty, empty])
    total.backward()
    assert torch.isfinite(total)
    assert terms["loss_bbox"] == 0 and terms["loss_giou"] == 0
    assert (logits.grad[..., :2] > 0).all()
    assert ((logits.grad[..., 2] < 0) == (family == DETR)).all()  # DETR's last output is "no object"


def test_a_query_without_an_object_counts_a_tenth_in_detrs_class_loss() -> None:
    # Uniform probabilities but for query 0, which gives its object 3/5; so does its match's class, 0.
    logits = torch.zeros(1, 3, 3, dtype=torch.float64)
    logits[0, 0, 0] = np.log(3)
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]], dtype=torch.float64)
    output = DetectorOutput(logits, box.expand(1, 3, 4))
    _, terms = Criterion(DETR)(output, [Target(torch.tensor([0]), box)])
    expected = (1.0 * -np.log(3 / 5) + 2 * 0.1 * -np.log(1 / 3)) / (1.0 + 2 * 0.1)
    assert terms["loss_ce"].item() == pytest.approx(expected, rel=1e-12)


def _match_one(logits: Tensor, boxes: Tensor, target: Target, family: str) -> list[list[Tensor]]:
    """Of every stage and layer (4,P), where there is one of each."""
    stage = Stage(logits[None], boxes[None], Objects.of([target], torch.device("cpu")))
    return [list(pairs.unbind(1)) for pairs in match([stage], OBJECTIVES[family].cost).pairs]


def test_more_objects_than_queries_match_every_query_once() -> None:
    boxes = torch.rand(1, 4, 4) * 0.5 + 0.2
    target = Target(torch.zeros(9, dtype=torch.long), torch.rand(9, 4) * 0.5 + 0.2)
    (((_, _, queries, objects),),) = _match_one(torch.zeros(1, 4, 2), boxes, target, DEFORMABLE_DETR)
    assert sorted(queries.tolist()) == [0, 1, 2, 3]
    assert len(set(objects.tolist())) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cost_that_is_not_finite_still_matches_with_a_warning(family: str) -> None:
    logits, boxes = even_predictions()
    boxes[0, 0] = float("nan")
    logits[0, 1] = float("nan")
    with pytest.warns(RuntimeWarning, match="ddetr: matching: logits and boxes of the model are not finite"):
        (((_, _, queries, objects),),) = _match_one(logits, boxes, CENTRED, family)
    assert queries.tolist() == [2] and objects.tolist() == [0]


@pytest.mark.parametrize(("bad", "name"), [(0, "logits"), (1, "boxes")])
def test_what_is_not_finite_is_named_once_however_often_it_comes(bad: int, name: str) -> None:
    good, predictions = even_predictions(), even_predictions()
    predictions[bad][0, 0, 0] = float("nan")
    layers = [torch.stack(of_layers) for of_layers in zip(good, predictions, strict=True)]
    objects = Objects.of([CENTRED], torch.device("cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            match([Stage(*layers, objects)], OBJECTIVES[DEFORMABLE_DETR].cost)
    assert [str(warning.message).split(" of the model")[0] for warning in caught] == [f"ddetr: matching: {name}"]


def even_predictions() -> tuple[Tensor, Tensor]:
    """Logits and boxes of three queries that all fit ``CENTRED`` alike."""
    return torch.zeros(1, 3, 2), torch.full((1, 3, 4), 0.5)


def test_focal_loss_of_an_even_guess_is_a_quarter_of_the_weighted_cross_entropy() -> None:
    # p = 1/2: alpha * (1/2)^2 * ln 2 for a positive, (1 - alpha) * (1/2)^2 * ln 2 for a negative.
    loss = focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))
    assert loss.sum().item() == pytest.approx((0.25 + 0.75) * 0.25 * np.log(2), rel=1e-6)


def test_giou_of_a_box_with_itself_is_one_and_of_distant_boxes_is_negative() -> None:
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
    # Second pair: no overlap, union 2, hull 4.
    assert paired_giou(a, b).tolist() == pytest.approx([1.0, -0.5])


def test_the_costs_of_all_layers_and_proposals_cross_to_the_host_in_one_copy(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.numel()) or copy(tensor))
    Criterion(case.family)(case.output, case.targets)
    assert len(copies) == 1


@pytest.mark.parametrize("size", [(0.0, 0.2), (0.2, 0.0), (0.0, 0.0)])
def test_a_predicted_box_without_area_has_a_finite_loss_and_gradient(size: tuple[float, float]) -> None:
    boxes = torch.tensor([[[0.5, 0.5, *size], [0.9, 0.9, 0.1, 0.1]]], requires_grad=True)
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    target = Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.1, 0.1]]))
    total, terms = Criterion(DEFORMABLE_DETR)(DetectorOutput(logits, boxes), [target])
    total.backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert torch.isfinite(boxes.grad).all() and torch.isfinite(logits.grad).all()
    assert terms["loss_giou"] >= 1  # no overlap
