"""Which pictures make up which step: an order that follows from seed and epoch, cut into steps and their parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ddetr_cli.errors import UsageError

WINDOW = 16  # batches among which pictures of like shape are put together


class BatchSampler(Sampler[list[int]]):
    """Lists of indices, one for each pass through the model, in an order that follows from (seed, epoch) alone.

    A step learns from ``batch_size`` pictures. They are divided among ``processes``, and what each gets among
    ``accumulate`` passes; this is the part of process ``index``. Iteration begins at step ``first`` of the epoch,
    where a resumed run left off.

    Pictures of like shape share a batch, chosen within a shuffled window of ``WINDOW`` batches: padding a batch of
    portraits and landscapes to one size would be a third of the work. A short last batch is left out, unless it is
    the only one. Raises UsageError for fewer pictures in a step than passes.
    """

    def __init__(
        self,
        aspects: Sequence[float],
        batch_size: int,
        seed: int,
        *,
        accumulate: int = 1,
        processes: int = 1,
        index: int = 0,
    ) -> None:
        self.aspects, self.batch_size, self.seed = np.asarray(aspects), batch_size, seed
        self.accumulate, self.processes, self.index = accumulate, processes, index
        self.epoch = self.first = 0
        smallest = min(batch_size, len(aspects))
        if smallest < processes * accumulate:
            raise UsageError(
                f"--batch-size: {smallest} images cannot be divided among {processes} processes with {accumulate} "
                "passes each. Use a larger batch, a smaller --accumulate or fewer processes."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return max(1, len(self.aspects) // self.batch_size)

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        first_part = self.index * self.accumulate
        for batch in self._batches()[self.first :]:
            parts = np.array_split(batch, self.processes * self.accumulate)
            yield from (part.tolist() for part in parts[first_part : first_part + self.accumulate])

    def _batches(self) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.aspects))[: max(self.steps * self.batch_size, 1)]
        batches: list[list[int]] = []
        for start in range(0, len(order), WINDOW * self.batch_size):
            window = order[start : start + WINDOW * self.batch_size]
            window = window[np.argsort(self.aspects[window], kind="stable")]
            batches += [window[i : i + self.batch_size].tolist() for i in range(0, len(window), self.batch_size)]
        rng.shuffle(batches)
        return batches
