from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ddetr_cli.data.records import CocoAnnotations, CocoCategory
from ddetr_cli.evaluate.matching import match
from ddetr_cli.evaluate.metrics import evaluate_detections
from ddetr_cli.evaluate.mistakes import EXCUSED, HIT, KINDS, MEANINGS, MISSED, Mistakes, find_mistakes, judge
from ddetr_cli.evaluate.table import Detection, table_of

Truth = Callable[..., CocoAnnotations]
RandomSet = Callable[[int], tuple[CocoAnnotations, list[Detection]]]
A = (100.0, 100.0, 100.0, 100.0)
NEAR_A = (140.0, 100.0, 100.0, 100.0)  # IoU 60 / 140
B = (300.0, 100.0, 100.0, 100.0)
NOWHERE = (500.0, 400.0, 50.0, 50.0)
CLASSES = (CocoCategory(1, "cat"), CocoCategory(2, "dog"))


def mistakes_of(truth: CocoAnnotations, *detections: Detection) -> Mistakes:
    table = table_of(truth, detections)
    return find_mistakes(match(truth, table), table)


def kinds(found: Mistakes) -> list[str]:
    names = {HIT: "hit", EXCUSED: "excused", **dict(enumerate(KINDS))}
    return [names[kind] for kind in found.kind.tolist()]


@pytest.mark.parametrize(
    ("detection", "expected"),
    [
        (Detection(1, 1, A, 0.9), "hit"),
        (Detection(1, 1, NEAR_A, 0.9), "localisation"),
        (Detection(1, 2, A, 0.9), "class"),
        (Detection(1, 2, NEAR_A, 0.9), "both"),
        (Detection(1, 1, NOWHERE, 0.9), "background"),
        (Detection(2, 1, A, 0.9), "background"),  # the object is in the other image
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_detection_is_what_its_overlaps_say(truth: Truth, detection: Detection, expected: str) -> None:
    assert kinds(mistakes_of(truth((1, 1, A), (2, 2, B), categories=CLASSES), detection)) == [expected]


def test_a_second_detection_of_an_object_is_a_duplicate(truth: Truth) -> None:
    found = mistakes_of(truth((1, 1, A)), Detection(1, 1, A, 0.5), Detection(1, 1, A, 0.9))
    assert kinds(found) == ["hit", "duplicate"]
    assert found.target.tolist() == [0, 0]
    assert found.cost["duplicate"] == 0  # AP50 is 1 already


def test_what_lies_in_a_crowd_is_no_mistake(truth: Truth) -> None:
    found = mistakes_of(truth((1, 1, A), (1, 1, B, True)), Detection(1, 1, B, 0.9), Detection(1, 1, A, 0.8))
    assert kinds(found) == ["excused", "hit"]
    assert not found.is_missed.any()


def test_an_object_is_missed_unless_a_mistake_about_it_would_be_mended(truth: Truth) -> None:
    ground_truth = truth((1, 1, A), (1, 1, B), categories=CLASSES)
    assert mistakes_of(ground_truth, Detection(1, 1, NEAR_A, 0.9)).is_missed.tolist() == [False, True]
    assert mistakes_of(ground_truth, Detection(1, 2, A, 0.9)).is_missed.tolist() == [False, True]
    assert mistakes_of(ground_truth, Detection(1, 2, NEAR_A, 0.9)).is_missed.tolist() == [True, True]


def test_the_cost_of_a_kind_is_the_ap50_of_a_world_without_it(truth: Truth) -> None:
    ground_truth = truth((1, 1, A), (1, 1, B))
    found = mistakes_of(ground_truth, Detection(1, 1, NOWHERE, 0.9), Detection(1, 1, A, 0.8))
    # Precision is 1/2 up to recall 0.50, 51 of 101 points, and the other object is not found.
    assert found.ap50 == pytest.approx(51 / 2 / 101)
    assert found.cost["background"] == pytest.approx(51 / 101 - found.ap50)
    assert found.cost[MISSED] == pytest.approx(1 / 2 - found.ap50)
    assert found.cost["localisation"] == found.cost["class"] == found.cost["both"] == 0


def test_a_mended_class_is_a_hit_of_the_right_one(truth: Truth) -> None:
    found = mistakes_of(
        truth((1, 1, A), (1, 2, B), categories=CLASSES), Detection(1, 2, A, 0.9), Detection(1, 2, B, 0.8)
    )
    assert found.ap50 == pytest.approx(0.25)
    assert found.cost["class"] == pytest.approx(0.75)


@pytest.mark.parametrize("seed", range(12))
def test_every_detection_has_one_kind_and_the_whole_is_ap50(seed: int, random_set: RandomSet) -> None:
    ground_truth, detections = random_set(seed)
    found = mistakes_of(ground_truth, *detections)
    assert found.ap50 == pytest.approx(evaluate_detections(ground_truth, detections).overall["AP50"] or 0, abs=1e-12)
    assert all(-2 <= kind < len(KINDS) for kind in found.kind.tolist())
    # Nothing mended makes it worse.
    assert min(found.cost.values()) >= -1e-12


def test_every_kind_has_a_meaning() -> None:
    assert set(MEANINGS) == {*KINDS, MISSED}


def test_verdicts_are_those_of_the_score_with_the_best_f1(truth: Truth) -> None:
    ground_truth = truth((1, 1, A), (1, 2, B), categories=CLASSES)
    table = table_of(
        ground_truth,
        [
            Detection(1, 1, A, 0.9),
            Detection(1, 1, B, 0.8),
            Detection(1, 2, NOWHERE, 0.3),
            Detection(1, 1, NOWHERE, 0.2),
        ],
    )
    matches = match(ground_truth, table)
    found = judge(matches, find_mistakes(matches, table))
    assert (found.threshold, found.precision, found.recall) == (0.9, 1.0, 0.5)
    assert found.f1 == pytest.approx(2 / 3)
    # Rows cat, dog, nothing; columns the same.
    assert found.confusion.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_an_object_under_a_wrong_name_is_confused_and_not_missed(truth: Truth) -> None:
    ground_truth = truth((1, 1, A), (1, 2, B), (2, 1, A), categories=CLASSES)
    detections = [
        Detection(1, 1, A, 0.9),
        Detection(1, 1, B, 0.9),
        Detection(2, 1, A, 0.9),
        Detection(2, 2, NOWHERE, 0.9),
    ]
    table = table_of(ground_truth, detections)
    matches = match(ground_truth, table)
    found = judge(matches, find_mistakes(matches, table))
    assert found.confusion.tolist() == [[2, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert found.is_found.tolist() == [True, False, True]


def test_nothing_found_gives_verdicts_of_nothing(truth: Truth) -> None:
    ground_truth = truth((1, 1, A))
    table = table_of(ground_truth, [])
    matches = match(ground_truth, table)
    found = judge(matches, find_mistakes(matches, table))
    assert (found.f1, found.precision, found.recall) == (0, 0, 0)
    assert np.array_equal(found.confusion, [[0, 1], [0, 0]])
