"""Times of short work on a GPU: many calls captured into one CUDA graph, so that nothing but the device is timed.

On a CPU the same calls run in a loop: tests of the measurement need no GPU, and its figures there mean little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from ddetr_cli.bench.timing import Samples

Call = Callable[[], object]

# A sample this long is far above the resolution of events, and short enough to take turns often.
_SAMPLE_SECONDS = 0.005
_MOST_REPEATS = 200


class Replay:
    """Calls that do the same work on inputs of their own, run one after the other; ``seconds`` is that of one."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls, self._device = calls, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._repeats = 1
        self._capture()
        self._repeats = max(1, min(_MOST_REPEATS, round(_SAMPLE_SECONDS / max(self.seconds() * len(calls), 1e-7))))

    def seconds(self) -> float:
        """One sample."""
        if self._graph is None:
            start = time.perf_counter()
            for _ in range(self._repeats):
                for call in self._calls:
                    call()
            return (time.perf_counter() - start) / (self._repeats * len(self._calls))
        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(self._device):
            start_event.record()
            for _ in range(self._repeats):
                self._graph.replay()
            end_event.record()
            end_event.synchronize()
        milliseconds: float = start_event.elapsed_time(end_event)
        return milliseconds / 1e3 / (self._repeats * len(self._calls))

    def _capture(self) -> None:
        if self._device.type != "cuda":
            for call in self._calls:
                call()
            return
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries choose and compile their kernels in the first calls
                    for call in self._calls:
                        call()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                for call in self._calls:
                    call()


def take_turns(
    replays: Mapping[str, Replay], rounds: int, on_run: Callable[[], None] | None = None
) -> dict[str, Samples]:
    """Seconds of each, one sample in every round; every round begins with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    order = list(replays)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(replays[name].seconds())
            if on_run is not None:
                on_run()
        order = order[1:] + order[:1]
    return {name: Samples(tuple(values)) for name, values in seconds.items()}
