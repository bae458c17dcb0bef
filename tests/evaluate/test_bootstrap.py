from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.evaluate.bootstrap import Resampling, intervals
from ddetr_cli.evaluate.matching import match
from ddetr_cli.evaluate.metrics import METRICS, evaluate_detections
from ddetr_cli.evaluate.table import Detection, ranks, table_of

Truth = Callable[..., CocoAnnotations]
RandomSet = Callable[[int], tuple[CocoAnnotations, list[Detection]]]
A = (100.0, 100.0, 100.0, 100.0)


def repeated(
    truth: CocoAnnotations, detections: list[Detection], times: np.ndarray
) -> tuple[CocoAnnotations, list[Detection]]:
    """The data set with each image as many times as its rank says, its copies next to each other."""
    place = {
        image.id: int(rank) for image, rank in zip(truth.images, ranks([i.id for i in truth.images]), strict=True)
    }
    copies = [(image.id, 1000 * place[image.id] + n) for image in truth.images for n in range(times[place[image.id]])]
    images = {image.id: image for image in truth.images}
    whole = CocoAnnotations(
        truth.path,
        tuple(replace(images[old], id=new) for old, new in copies),
        tuple(replace(a, image_id=new) for old, new in copies for a in truth.annotations if a.image_id == old),
        truth.categories,
    )
    return whole, [replace(d, image_id=new) for old, new in copies for d in detections if d.image_id == old]


@pytest.mark.parametrize("seed", range(25))
def test_a_sample_scores_as_the_data_set_with_its_images_repeated(seed: int, random_set: RandomSet) -> None:
    truth, detections = random_set(seed)
    # Of equal scores within an image, all copies of the first come before the second here, and in turn there.
    scores = np.random.default_rng(seed).permutation(len(detections)) / 1000
    detections = [replace(d, score=s) for d, s in zip(detections, scores.tolist(), strict=True)]
    times = np.random.default_rng(seed).integers(0, 4, len(truth.images))
    found = Resampling(match(truth, table_of(truth, detections))).of(times)
    expected = evaluate_detections(*repeated(truth, detections, times)).overall
    for name, value in zip(METRICS, found, strict=True):
        assert value == pytest.approx(np.nan if expected[name] is None else expected[name], abs=1e-9, nan_ok=True)


def test_images_drawn_once_each_score_as_the_whole(random_set: RandomSet) -> None:
    truth, detections = random_set(3)
    found = Resampling(match(truth, table_of(truth, detections))).of(np.ones(len(truth.images), dtype=np.int64))
    assert found == pytest.approx(list(evaluate_detections(truth, detections).overall.values()), abs=1e-9)


def test_an_interval_is_the_same_every_time_and_holds_the_number(truth: Truth) -> None:
    ground_truth = truth(*((i, 1, A) for i in range(1, 21)))
    matches = match(ground_truth, table_of(ground_truth, [Detection(i, 1, A, 0.9) for i in range(1, 11)]))
    found = intervals(matches, 20, 400)
    assert found == intervals(matches, 20, 400)
    low, high = found["AR100"] or (0, 0)
    assert low < 0.5 < high
    # Half of 20 images, drawn 20 times: a binomial, whose 95 % lie within 2.2 standard deviations of 0.112.
    assert (low, high) == (pytest.approx(0.28, abs=0.05), pytest.approx(0.72, abs=0.05))
    assert found["APs"] is None


def test_perfect_detections_are_perfect_in_every_sample(truth: Truth) -> None:
    ground_truth = truth(*((i, 1, A) for i in range(1, 6)))
    matches = match(ground_truth, table_of(ground_truth, [Detection(i, 1, A, 0.9) for i in range(1, 6)]))
    assert intervals(matches, 5, 20)["AP"] == (pytest.approx(1.0), pytest.approx(1.0))
