from __future__ import annotations

import pytest

from ddetr_cli.errors import UsageError
from ddetr_cli.train.sampler import BatchSampler


def test_the_order_of_an_epoch_follows_from_seed_and_epoch() -> None:
    sampler = BatchSampler([1.0] * 50, 4, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    assert len(first) == len(sampler) == 12 and all(len(batch) == 4 for batch in first)
    assert len({index for batch in first for index in batch}) == 48
    sampler.epoch = 1
    assert list(sampler) != first


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    assert [sorted(batch) for batch in BatchSampler([1.0, 2.0], 4, seed=3)] == [[0, 1]]


def test_portraits_and_landscapes_do_not_share_batches() -> None:
    aspects = [0.75, 1.5] * 64
    mixed = sum(len({aspects[index] for index in batch}) > 1 for batch in BatchSampler(aspects, 4, seed=1))
    # At most one batch of each of the two windows holds the border between them.
    assert mixed <= 2


def test_an_epoch_goes_on_at_any_of_its_steps() -> None:
    sampler = BatchSampler([1.0] * 50, 4, seed=3, accumulate=2)
    whole = list(sampler)
    sampler.first = 5
    assert list(sampler) == whole[10:] and len(sampler) == 14


def test_the_parts_of_all_processes_and_passes_make_up_the_batch_of_one_process() -> None:
    aspects = [0.5 + i / 40 for i in range(41)]
    whole = list(BatchSampler(aspects, 7, seed=3))
    shares = [list(BatchSampler(aspects, 7, seed=3, accumulate=2, processes=2, index=i)) for i in range(2)]
    assert [len(share) for share in shares] == [10, 10]
    for step, batch in enumerate(whole):
        parts = [share[2 * step + number] for share in shares for number in range(2)]
        assert [index for part in parts for index in part] == batch
        assert sorted(len(part) for part in parts) == [1, 2, 2, 2]


def test_a_batch_smaller_than_its_parts_is_refused() -> None:
    with pytest.raises(UsageError, match="3 images cannot be divided among 2 processes with 2 passes each"):
        BatchSampler([1.0] * 9, 3, seed=1, accumulate=2, processes=2)
