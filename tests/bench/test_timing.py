"""Rounds in turns, and the three numbers made of them."""

from __future__ import annotations

import pytest

from ddetr_cli.bench.timing import Latency, quantile, time_interleaved


def test_rounds_take_the_models_in_turns() -> None:
    order: list[str] = []
    time_interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b", "a", "b", "a", "b"]


def test_each_model_gets_the_seconds_of_its_own_runs() -> None:
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    found = time_interleaved(
        {"slow": lambda: wait(2.0), "fast": lambda: wait(0.5)},
        rounds=2,
        on_run=lambda: wait(100.0),  # must not be counted
        clock=lambda: now,
    )
    assert found == {"slow": Latency((2.0, 2.0)), "fast": Latency((0.5, 0.5))}


def test_median_p90_and_fastest_of_eleven_values() -> None:
    latency = Latency(tuple(float(v) for v in (10, 0, 9, 1, 8, 2, 7, 3, 6, 4, 5)))
    assert (latency.median, latency.p90, latency.fastest) == (5.0, 9.0, 0.0)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 2.0), (0.75, 3.0), (1.0, 4.0)])
def test_quantiles_are_interpolated(share: float, expected: float) -> None:
    assert quantile([4.0, 1.0, 2.0], share) == pytest.approx(expected)


def test_a_single_round_is_its_own_median_and_p90() -> None:
    latency = Latency((0.25,))
    assert (latency.median, latency.p90, latency.fastest) == (0.25, 0.25, 0.25)
