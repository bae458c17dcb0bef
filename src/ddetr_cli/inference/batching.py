"""How many pictures a GPU computes together, from the memory that one takes and the memory that is free."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Further ones gain little, and each is some megabytes of pinned memory besides.
MOST_TOGETHER = 16
# Of the free memory: larger batches fragment it, and other programs want some.
_SHARE = 0.8


def batch_that_fits(free_bytes: int, bytes_of_one: int, *, runs_kept: int = 0) -> int:
    """Pictures of ``bytes_of_one`` each that run together; ``runs_kept`` more runs keep the memory they took."""
    return max(1, min(MOST_TOGETHER, int(_SHARE * free_bytes) // max(1, bytes_of_one * (1 + runs_kept))))


def measured_batch_size(run_one: Callable[[], bool], device: torch.device, *, runs_kept: int = 0) -> int:
    """``batch_that_fits`` of what ``run_one`` takes at its most; 1 where it says that not even one fits.

    It is called twice: at first libraries prepare themselves, in memory that no picture takes again.
    """
    if not run_one():
        return 1
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    if not run_one():
        return 1
    of_one = torch.cuda.max_memory_allocated(device) - before
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return batch_that_fits(torch.cuda.mem_get_info(device)[0] + unused, of_one, runs_kept=runs_kept)
