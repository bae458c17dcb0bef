"""Times measured so that they can be compared: every round runs every candidate once, in turn.

A slow minute of the machine then slows all candidates alike, instead of the one that was unlucky; and a ratio is
made of two runs of one round, never of two figures from different minutes.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Quartiles further apart than this share of the median: whatever differs by less cannot be told apart.
NOISY_SPREAD = 0.1

# A single run shorter than this is repeated inside one sample: the clock and the call would be part of it.
SHORTEST_SAMPLE = 0.005


@dataclass(frozen=True)
class Samples:
    """One figure per round, in the order they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def p90(self) -> float:
        """Nine of ten are at most this (interpolated)."""
        return quantile(self.values, 0.9)

    @property
    def p99(self) -> float:
        """Ninety-nine of a hundred are at most this; of few samples, nearly the largest."""
        return quantile(self.values, 0.99)

    @property
    def smallest(self) -> float:
        """Of times, the one least disturbed."""
        return min(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half lies between these."""
        return quantile(self.values, 0.25), quantile(self.values, 0.75)

    @property
    def spread(self) -> float:
        """The width of the middle half, as a share of the median."""
        low, high = self.quartiles
        return (high - low) / self.median

    @property
    def is_noisy(self) -> bool:
        """Whether the spread forbids conclusions from small differences."""
        return self.spread > NOISY_SPREAD

    def over(self, other: Samples) -> Samples:
        """Quotients round by round: how many times as large as ``other`` this is."""
        return Samples(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def scaled(self, factor: float) -> Samples:
        """Every value times ``factor``."""
        return Samples(tuple(value * factor for value in self.values))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with every sample."""
        low, high = self.quartiles
        return {
            "median": self.median,
            "q1": low,
            "q3": high,
            "p90": self.p90,
            "p99": self.p99,
            "min": self.smallest,
            "samples": list(self.values),
        }


def noise_notes(times: Mapping[str, Samples]) -> tuple[str, ...]:
    """The sentence that forbids conclusions, where something among ``times`` was too noisy for them."""
    noisy = {name: samples.spread for name, samples in times.items() if samples.is_noisy}
    if not noisy:
        return ()
    worst = max(noisy, key=lambda name: noisy[name])
    note = (
        f"too noisy to conclude from small differences: quartiles more than {NOISY_SPREAD:.0%} of the median apart "
        f"in {len(noisy)} of {len(times)}, worst {noisy[worst]:.0%} ({worst}). Measure again on a quieter machine, "
        "or with more --rounds"
    )
    return (note,)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of ``values`` lie at or below, interpolated between the two nearest."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def time_interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    repeats: Mapping[str, int] | None = None,
    on_run: Callable[[], None] | None = None,
    on_round: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Seconds of one call of each of ``runs``, over ``rounds`` rounds.

    Every round begins with another one, and the others follow in an order that changes from round to round, so that
    nobody always runs in the caches that the same predecessor left; it is the same each time. A run returns when its
    result is there; on a GPU it has to wait for it. ``repeats`` says how often a short one is called for one sample,
    which is then their mean. ``on_run`` is called after every sample and ``on_round`` after every round,
    outside the time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names, shuffled = list(runs), random.Random(0)
    for turn in range(rounds if names else 0):
        first = names[turn % len(names)]
        others = [name for name in names if name != first]
        shuffled.shuffle(others)
        for name in [first, *others]:
            count = 1 if repeats is None else repeats[name]
            start = clock()
            for _ in range(count):
                runs[name]()
            seconds[name].append((clock() - start) / count)
            if on_run is not None:
                on_run()
        if on_round is not None:
            on_round()
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def warm_up(
    runs: Mapping[str, Callable[[], object]], count: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, int]:
    """Run everything ``count`` times untimed, and say how often each has to be called for one sample."""
    repeats = {}
    for name, run in runs.items():
        seconds = math.inf
        for _ in range(count):
            start = clock()
            run()
            seconds = clock() - start
        repeats[name] = max(1, min(1000, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-9))))
    return repeats
