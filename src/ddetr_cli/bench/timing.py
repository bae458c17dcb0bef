"""Latencies measured so that they can be compared: every round runs every model once, in turn.

A slow minute of the machine then slows all models alike, instead of the one that was unlucky.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Latency:
    """Wall-clock seconds of one model's rounds, in the order they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def p90(self) -> float:
        """Nine of ten are at most this (interpolated)."""
        return quantile(self.seconds, 0.9)

    @property
    def fastest(self) -> float:
        """The one least disturbed."""
        return min(self.seconds)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of ``values`` lie at or below, interpolated between the two nearest."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def time_interleaved(
    runs: Mapping[str, Callable[[], None]],
    rounds: int,
    *,
    on_run: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Latencies of each of ``runs`` over ``rounds`` rounds.

    A run returns when its result is there; on a GPU it has to wait for it. ``on_run`` is called after every single
    run, outside the time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
            if on_run is not None:
                on_run()
    return {name: Latency(tuple(values)) for name, values in seconds.items()}
