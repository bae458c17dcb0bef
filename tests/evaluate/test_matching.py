"""The fast evaluator beside pycocotools: every curve and number, to the last bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddetr_cli.data.records import CocoAnnotation, CocoAnnotations, CocoCategory, CocoImage, ImageId
from ddetr_cli.evaluate.accumulate import accumulate
from ddetr_cli.evaluate.matching import match, overlaps
from ddetr_cli.evaluate.metrics import evaluate_detections
from ddetr_cli.evaluate.reference import pycocotools_curves
from ddetr_cli.evaluate.table import Detection, table_of

Truth = Callable[..., CocoAnnotations]
A = (100.0, 100.0, 100.0, 100.0)

# Ids as data sets have them: plain, text, huge, mixed, negative, from 0.
IDS: tuple[Callable[[int], ImageId], ...] = (
    lambda i: i,
    str,
    lambda i: i + 2**60,
    lambda i: str(i) if i % 2 else i,
    lambda i: -3 * i,
    lambda i: i - 1,
)


def random_set(seed: int) -> tuple[CocoAnnotations, list[Detection]]:
    """A small data set with all that makes scoring hard, and detections near its objects and elsewhere.

    Crowds, boxes of equal overlap (on a grid), equal scores, areas on the borders of the sizes, images and classes
    without objects or detections, over 100 detections in one image, unlisted categories, any order.
    """
    r = np.random.default_rng(seed)
    image_id, category_id = (IDS[int(i)] for i in r.integers(0, len(IDS), 2))
    images = [CocoImage(image_id(int(i)), f"{i}.jpg", 640, 480) for i in r.permutation(int(r.integers(1, 9))) + 1]
    categories = [CocoCategory(category_id(int(i)), f"c{i}") for i in r.permutation(int(r.integers(1, 5))) + 1]
    is_grid, is_dense, has_ties, is_blind = (r.random(4) < (0.5, 0.2, 0.5, 0.05)).tolist()
    area_kind = r.integers(3)

    def boxes(count: int) -> np.ndarray:
        if is_grid:
            corner, size = 20 * r.integers(0, 6, (count, 2)), 20 * r.integers(1, 6, (count, 2))
        else:
            corner, size = r.uniform(0, 200, (count, 2)), np.exp(r.uniform(1.5, 5, (count, 2)))
        return np.concatenate([corner, size], axis=1).astype(float)

    annotations: list[CocoAnnotation] = []
    detections: list[Detection] = []
    for image in images:
        objects = boxes(int(r.integers(0, 40 if is_dense else 8)) if r.random() > 0.15 else 0)
        classes = r.integers(0, len(categories), len(objects))
        area = objects[:, 2] * objects[:, 3]
        if area_kind == 1:
            area = area * r.uniform(0, 2, len(area))
        elif area_kind == 2:
            area = r.choice([0, 400, 1023.9, 1024, 9216, 9216.1, 1e11], len(area)).astype(float)
        for k, box in enumerate(objects.tolist()):
            ids = len(annotations) + 1, image.id, categories[classes[k]].id
            annotations.append(CocoAnnotation(*ids, tuple(box), float(area[k]), bool(r.random() < 0.15)))
        found = boxes(int(r.integers(0, 260 if is_dense else 30)) if r.random() > 0.1 and not is_blind else 0)
        labels = r.integers(0, len(categories), len(found))
        if len(objects) and r.random() < 0.8:
            near = r.integers(0, len(objects), len(found))
            shift = (
                r.normal(0, 0.15, found.shape) * objects[near][:, [2, 3, 2, 3]] * (r.random((len(found), 1)) < 0.7)
            )
            found = objects[near] + shift
            found[:, 2:] = found[:, 2:].clip(0)
            labels = np.where(r.random(len(found)) < 0.8, classes[near], labels)
        scores = r.integers(-1, 4, len(found)) / 4 if has_ties else r.random(len(found))
        for k, box in enumerate(found.tolist()):
            category = categories[labels[k]].id if r.random() > 0.02 else "unlisted"
            detections.append(Detection(image.id, category, tuple(box), float(scores[k])))
    if r.random() < 0.5:
        detections = [detections[i] for i in r.permutation(len(detections))]
        annotations = [annotations[i] for i in r.permutation(len(annotations))]
    return CocoAnnotations(Path("t.json"), tuple(images), tuple(annotations), tuple(categories)), detections


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 1000), marks=pytest.mark.slow)], ids=["60 sets", "940 sets"]
)
def test_random_sets_score_the_same_to_the_last_bit(seeds: range) -> None:
    for seed in seeds:
        ground_truth, detections = random_set(seed)
        fast = evaluate_detections(ground_truth, detections)
        assert fast == evaluate_detections(ground_truth, detections, evaluator="pycocotools"), f"set {seed}"


def test_the_random_sets_hold_what_they_promise() -> None:
    sets = [random_set(seed) for seed in range(60)]
    truths = [truth for truth, _ in sets]
    assert any(annotation.iscrowd for truth in truths for annotation in truth.annotations)
    assert any(not truth.annotations for truth in truths)
    assert any(not detections for _, detections in sets)
    assert any(isinstance(image.id, str) for truth in truths for image in truth.images)
    assert max(count for _, found in sets for count in Counter(d.image_id for d in found).values()) > 200
    assert any(len({d.score for d in detections}) < len(detections) / 4 for _, detections in sets if detections)


@pytest.mark.parametrize("seed", range(20))
def test_the_curves_themselves_are_pycocotools(seed: int) -> None:
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


def test_many_pairs_are_compared_in_parts(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    ground_truth, detections = random_set(6)
    whole = evaluate_detections(ground_truth, detections)
    monkeypatch.setattr("ddetr_cli.evaluate.matching._PAIRS", 7)
    assert evaluate_detections(ground_truth, detections) == whole
