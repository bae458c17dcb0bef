from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.evaluate.report.comparison import compare, write_comparison
from ddetr_cli.evaluate.report.evaluated import Evaluated
from ddetr_cli.evaluate.table import Detection

MakeRun = Callable[..., Evaluated]
A = (100.0, 100.0, 100.0, 100.0)
B = (300.0, 100.0, 100.0, 100.0)


@pytest.fixture
def two(make_run: MakeRun) -> tuple[Evaluated, Evaluated]:
    """One that finds a cat, and one that finds the dog and the other cat."""
    first = make_run(Detection(1, 1, A, 0.9), name="one")
    return first, make_run(Detection(1, 2, B, 0.9), Detection(2, 1, A, 0.9), name="two")


def test_differences_are_second_minus_first_and_objects_are_told_apart(two: tuple[Evaluated, Evaluated]) -> None:
    found = compare(*two)
    assert found.difference["AR100"] == pytest.approx((1 + 1 / 2) / 2 - 1 / 4)
    assert found.difference["APs"] is None
    assert found.only_first.tolist() == [True, False, False]
    assert found.only_second.tolist() == [False, True, True]
    assert found.intervals == {}
    names = [row[0] for row in found.class_differences()]
    assert names[0].startswith("<dog>")


def test_a_run_compared_with_itself_has_not_changed(two: tuple[Evaluated, Evaluated]) -> None:
    found = compare(two[0], two[0], samples=10)
    assert set(found.difference.values()) <= {0.0, None}
    assert not found.only_first.any()
    # The same images are drawn for both, so the difference is 0 in every draw.
    assert {interval for interval in found.intervals.values() if interval} == {(0.0, 0.0)}


def test_the_page_shows_both_and_is_whole(
    two: tuple[Evaluated, Evaluated], tmp_path: Path, checked: Callable[[str], Any]
) -> None:
    path = write_comparison(compare(*two, samples=10), tmp_path, datetime(2026, 1, 2, 3, 4, tzinfo=UTC))
    text = checked(path.read_text()).text
    assert "one and two on" in text
    assert "2026-01-02 03:04" in text
    assert "1 objects are found by one alone, 2 by two alone" in text
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == ["ap_of_classes.png", "mistakes.png"]
