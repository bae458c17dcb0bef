"""The fast evaluator beside pycocotools: every curve and number, to the last bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.evaluate.accumulate import accumulate
from ddetr_cli.evaluate.matching import match, overlaps
from ddetr_cli.evaluate.metrics import evaluate_detections
from ddetr_cli.evaluate.reference import pycocotools_curves
from ddetr_cli.evaluate.table import Detection, table_of

Truth = Callable[..., CocoAnnotations]
RandomSet = Callable[[int], tuple[CocoAnnotations, list[Detection]]]
A = (100.0, 100.0, 100.0, 100.0)


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 1000), marks=pytest.mark.slow)], ids=["60 sets", "940 sets"]
)
def test_random_sets_score_the_same_to_the_last_bit(seeds: range, random_set: RandomSet) -> None:
    for seed in seeds:
        ground_truth, detections = random_set(seed)
        fast = evaluate_detections(ground_truth, detections)
        assert fast == evaluate_detections(ground_truth, detections, evaluator="pycocotools"), f"set {seed}"


def test_the_random_sets_hold_what_they_promise(random_set: RandomSet) -> None:
    sets = [random_set(seed) for seed in range(60)]
    truths = [truth for truth, _ in sets]
    assert any(annotation.iscrowd for truth in truths for annotation in truth.annotations)
    assert any(not truth.annotations for truth in truths)
    assert any(not detections for _, detections in sets)
    assert any(isinstance(image.id, str) for truth in truths for image in truth.images)
    assert max(count for _, found in sets for count in Counter(d.image_id for d in found).values()) > 200
    assert any(len({d.score for d in detections}) < len(detections) / 4 for _, detections in sets if detections)


@pytest.mark.parametrize("seed", range(20))
def test_the_curves_themselves_are_pycocotools(seed: int, random_set: RandomSet) -> None:
    ground_truth, detections = random_set(seed)
    table = table_of(ground_truth, detections)
    ours, theirs = accumulate(match(ground_truth, table)), pycocotools_curves(ground_truth, table)
    assert np.array_equal(ours.precision, theirs.precision)
    assert np.array_equal(ours.recall, theirs.recall)
    # Ours is the score of the first hit at recall 0 too, where pycocotools gives that of the first detection.
    reached = (ours.precision > 0) & (np.arange(101)[:, None, None] > 0)
    assert np.array_equal(ours.score[reached], theirs.score[reached])


def test_an_object_is_found_by_the_best_score_and_once_only(truth: Truth) -> None:
    found = match(truth((1, 1, A)), table_of(truth((1, 1, A)), [Detection(1, 1, A, s) for s in (0.3, 0.9, 0.5)]))
    assert found.row.tolist() == [1, 2, 0]
    assert found.is_hit[:, 0].any(axis=1).tolist() == [True, False, False]
    assert found.found[:, 0].tolist() == [0, -1, -1]


def test_of_two_equal_objects_the_later_one_is_found(truth: Truth) -> None:
    ground_truth = truth((1, 1, A), (1, 1, A))
    assert match(ground_truth, table_of(ground_truth, [Detection(1, 1, A, 0.9)])).found[0].tolist() == [1] * 10


def test_a_crowd_takes_any_number_of_detections(truth: Truth) -> None:
    ground_truth = truth((1, 1, A, True))
    found = match(ground_truth, table_of(ground_truth, [Detection(1, 1, A, 0.9)] * 3))
    assert found.is_excused[:, 0].all()
    assert not found.is_hit.any()


def test_an_object_that_counts_is_preferred_to_a_crowd_that_fits_better(truth: Truth) -> None:
    ground_truth = truth((1, 1, A, True), (1, 1, (100.0, 100.0, 100.0, 60.0)))
    found = match(ground_truth, table_of(ground_truth, [Detection(1, 1, A, 0.9)]))
    assert found.found[0].tolist() == [1, 1, 1] + [0] * 7  # its IoU is 0.6


def test_boxes_so_small_that_their_area_is_0_do_not_overlap() -> None:
    tiny = np.array([[0.0, 0.0, 1e-200, 1e-200]])
    assert overlaps(tiny, tiny, np.array([False])).tolist() == [0.0]  # pycocotools has 0/0, which matches everything


def test_many_pairs_are_compared_in_parts(random_set: RandomSet, monkeypatch: pytest.MonkeyPatch) -> None:
    ground_truth, detections = random_set(6)
    whole = evaluate_detections(ground_truth, detections)
    monkeypatch.setattr("ddetr_cli.evaluate.matching._PAIRS", 7)
    assert evaluate_detections(ground_truth, detections) == whole
