from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.evaluate.matching import match
from ddetr_cli.evaluate.measures import by_size, calibrate
from ddetr_cli.evaluate.mistakes import find_mistakes
from ddetr_cli.evaluate.table import Detection, table_of

Truth = Callable[..., CocoAnnotations]
A = (100.0, 100.0, 100.0, 100.0)
TINY = (10.0, 10.0, 10.0, 10.0)
NOWHERE = (500.0, 400.0, 50.0, 50.0)


def test_scores_are_compared_with_how_often_they_are_right(truth: Truth) -> None:
    ground_truth = truth((1, 1, A))
    table = table_of(
        ground_truth, [Detection(1, 1, A, 0.98), Detection(1, 1, NOWHERE, 0.92), Detection(1, 1, A, 0.25)]
    )
    matches = match(ground_truth, table)
    found = calibrate(matches, find_mistakes(matches, table))
    assert found.count.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 2]
    assert (found.score[9], found.right[9]) == (pytest.approx(0.95), 0.5)
    assert np.isnan(found.right[0])
    assert found.error == pytest.approx((2 * 0.45 + 0.25) / 3)


def test_scores_past_1_belong_to_the_last_bin(truth: Truth) -> None:
    ground_truth = truth((1, 1, A))
    table = table_of(ground_truth, [Detection(1, 1, A, 7.0), Detection(1, 1, A, -7.0)])
    matches = match(ground_truth, table)
    assert calibrate(matches, find_mistakes(matches, table)).count[[0, 9]].tolist() == [1, 1]


def test_ap_is_told_for_each_range_of_sizes_that_occurs(truth: Truth) -> None:
    ground_truth = truth((1, 1, A), (1, 1, TINY), (2, 1, TINY))
    found = by_size(ground_truth, table_of(ground_truth, [Detection(1, 1, A, 0.9), Detection(1, 1, TINY, 0.8)]))
    assert [(b.label, b.objects) for b in found] == [("< 16", 2), ("96-192", 1)]
    assert found[0].ap == pytest.approx(51 / 101)
    assert (found[1].ap, found[1].ap50) == (pytest.approx(1.0), pytest.approx(1.0))
