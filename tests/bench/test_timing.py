"""Rounds in turns, and the numbers made of them."""

from __future__ import annotations

import pytest

from ddetr_cli.bench.timing import Samples, noise_notes, quantile, time_interleaved, warm_up


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def orders(rounds: int) -> list[str]:
    """In which order ``a``, ``b``, ``c`` and ``d`` run, round by round."""
    order: list[str] = []
    time_interleaved({name: lambda name=name: order.append(name) for name in "abcd"}, rounds=rounds)
    return ["".join(order[i : i + 4]) for i in range(0, len(order), 4)]


def test_every_round_runs_everyone_once_and_each_begins_with_another() -> None:
    found = orders(8)
    assert all(sorted(order) == list("abcd") for order in found)
    assert "".join(order[0] for order in found) == "abcdabcd"


def test_nobody_always_follows_the_same_one_and_the_order_is_the_same_each_time() -> None:
    found = orders(12)
    followers = {name: {order[order.index(name) + 1] for order in found if order[-1] != name} for name in "abcd"}
    assert all(len(others) > 1 for others in followers.values())
    assert found == orders(12)


def test_everyone_gets_the_seconds_of_its_own_runs_in_the_order_they_were_named() -> None:
    clock = Clock()
    found = time_interleaved(
        {"slow": lambda: clock.wait(2.0), "fast": lambda: clock.wait(0.5)},
        rounds=2,
        on_run=lambda: clock.wait(100.0),  # must not be counted
        on_round=lambda: clock.wait(1000.0),
        clock=clock,
    )
    assert list(found) == ["slow", "fast"]
    assert found == {"slow": Samples((2.0, 2.0)), "fast": Samples((0.5, 0.5))}
    assert clock.now == 2 * (2.5 + 2 * 100 + 1000)


def test_a_repeated_run_gives_the_mean_of_its_calls() -> None:
    clock = Clock()
    calls: list[float] = []

    def run() -> None:
        calls.append(clock.now)
        clock.wait(0.25)

    assert time_interleaved({"a": run}, 1, repeats={"a": 8}, clock=clock) == {"a": Samples((0.25,))}
    assert len(calls) == 8


def test_warming_up_says_how_often_a_short_run_has_to_be_called() -> None:
    clock = Clock()
    runs = {"long": lambda: clock.wait(1.0), "short": lambda: clock.wait(0.002), "none": lambda: None}
    assert warm_up(runs, 2, clock=clock) == {"long": 1, "short": 3, "none": 1000}


def test_median_p90_smallest_and_quartiles_of_eleven_values() -> None:
    samples = Samples(tuple(float(v) for v in (10, 0, 9, 1, 8, 2, 7, 3, 6, 4, 5)))
    assert (samples.median, samples.p90, samples.smallest) == (5.0, 9.0, 0.0)
    assert samples.quartiles == (2.5, 7.5)
    assert samples.spread == 1.0


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 2.0), (0.75, 3.0), (1.0, 4.0)])
def test_quantiles_are_interpolated(share: float, expected: float) -> None:
    assert quantile([4.0, 1.0, 2.0], share) == pytest.approx(expected)


def test_a_single_round_is_its_own_median_and_p90_without_spread() -> None:
    samples = Samples((0.25,))
    assert (samples.median, samples.p90, samples.smallest, samples.spread) == (0.25, 0.25, 0.25, 0.0)


def test_a_ratio_pairs_rounds_so_that_a_slow_minute_cancels() -> None:
    ours, theirs = Samples((1.0, 5.0, 1.0)), Samples((2.0, 10.0, 2.0))
    assert theirs.over(ours) == Samples((2.0, 2.0, 2.0))


def test_ratios_of_different_numbers_of_rounds_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Samples((1.0, 2.0)).over(Samples((1.0,)))


def test_noise_is_said_of_the_worst_and_counted() -> None:
    times = {"calm": Samples((1.0, 1.0, 1.01)), "wild": Samples((1.0, 2.0, 3.0)), "rough": Samples((1.0, 1.3, 1.0))}
    (note,) = noise_notes(times)
    assert "too noisy to conclude" in note
    assert "2 of 3, worst 50% (wild)" in note


def test_quiet_measurements_get_no_such_note() -> None:
    assert noise_notes({"calm": Samples((1.0, 1.02, 1.01))}) == ()


def test_json_holds_every_sample() -> None:
    assert Samples((3.0, 1.0)).to_json() == {
        "median": 2.0, "q1": 1.5, "q3": 2.5, "p90": 2.8, "p99": 2.98, "min": 1.0, "samples": [3.0, 1.0],
    }  # fmt: skip
