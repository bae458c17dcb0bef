"""Which pictures make up which step: an order that follows from seed and epoch, cut into steps and their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ddetr_cli.errors import UsageError
from ddetr_cli.train.dataset import PAD_MULTIPLE

# Pictures among which those of like shape are put together: at least so many, and at least so many batches.
WINDOW_IMAGES, WINDOW_BATCHES = 512, 16

Shapes = Callable[[int, Sequence[int]], NDArray[np.int64]]  # epoch, N indices -> (N,2) height and width


class BatchSampler(Sampler[list[int]]):
    """Lists of indices, one for each pass through the model, in an order that follows from (seed, epoch) alone.

    A step learns from ``batch_size`` pictures. They are divided among ``processes``, and what each gets among
    ``accumulate`` passes; this is the part of process ``index``. Iteration begins at step ``first`` of the epoch,
    where a resumed run left off.

    The order is shuffled, then within windows of it pictures of like shape, as the network will see them in this
    epoch, are put into the same step: padding them to one size would be a third of the work. The steps of a window
    are shuffled again. A short last batch is left out, unless it is the only one. Raises UsageError for fewer
    pictures in a step than passes.
    """

    def __init__(
        self,
        count: int,
        shapes: Shapes,
        batch_size: int,
        seed: int,
        *,
        accumulate: int = 1,
        processes: int = 1,
        index: int = 0,
    ) -> None:
        self.count, self.shapes, self.batch_size, self.seed = count, shapes, batch_size, seed
        self.accumulate, self.processes, self.index = accumulate, processes, index
        self.epoch = self.first = 0
        smallest = min(batch_size, count)
        if smallest < processes * accumulate:
            raise UsageError(
                f"--batch-size: {smallest} images cannot be divided among {processes} processes with {accumulate} "
                "passes each. Use a larger batch, a smaller --accumulate or fewer processes."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return max(1, self.count // self.batch_size)

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        first_part = self.index * self.accumulate
        for batch in self._batches():
            parts = np.array_split(batch, self.processes * self.accumulate)
            yield from (part.tolist() for part in parts[first_part : first_part + self.accumulate])

    def padding(self, images: int) -> tuple[float, float]:
        """Padded over own pixels in about the first ``images`` of this epoch: of its passes, and of shuffled ones."""
        order = self._order()[: max(images // self.batch_size, 1) * self.batch_size]
        grouped = [
            batch for start in range(0, len(order), self._window_images) for batch in self._window(order, start)
        ]
        shuffled = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return self._waste(grouped), self._waste(shuffled)

    def _waste(self, batches: Sequence[NDArray[np.int64]]) -> float:
        padded = own = 0
        for batch in batches:
            for part in np.array_split(batch, self.processes * self.accumulate):
                hw = self.shapes(self.epoch, part.tolist())
                padded += padded_area(hw)
                own += int(hw.prod(1).sum())
        return padded / own

    def _order(self) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, self.epoch))
        return rng.permutation(self.count)[: max(self.steps * self.batch_size, 1)]

    @property
    def _window_images(self) -> int:
        return max(-(-WINDOW_IMAGES // self.batch_size), WINDOW_BATCHES) * self.batch_size

    def _batches(self) -> Iterator[NDArray[np.int64]]:
        """From step ``first`` on; the shapes of windows before it are not asked for."""
        order, window = self._order(), self._window_images
        skipped, within = divmod(self.first, window // self.batch_size)
        for start in range(skipped * window, len(order), window):
            yield from self._window(order, start)[within:]
            within = 0

    def _window(self, order: NDArray[np.int64], start: int) -> list[NDArray[np.int64]]:
        """The batches of one window, in their order."""
        window = order[start : start + self._window_images]
        # Sizes that are padded alike count as equal, so that chance decides which of them share a batch.
        height, width = -(-self.shapes(self.epoch, window.tolist()).T // PAD_MULTIPLE)
        # Widths rise within one height and fall within the next: neighbours are alike across it too.
        window = window[np.lexsort((np.where(height % 2, width, -width), height))]
        batches = [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
        turn = np.random.default_rng((self.seed, self.epoch, start)).permutation(len(batches))
        return [batches[i] for i in turn]


def padded_area(hw: NDArray[np.int64]) -> int:
    """Pixels of a batch of pictures of the sizes ``hw`` (B,2) once they are padded to one, as ``collate`` does."""
    if (hw == hw[0]).all():
        return int(hw.prod(1).sum())
    height, width = -(-hw.max(0) // PAD_MULTIPLE) * PAD_MULTIPLE
    return int(len(hw) * height * width)
