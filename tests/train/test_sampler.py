from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ddetr_cli.data.coco import read_annotations
from ddetr_cli.errors import UsageError
from ddetr_cli.train import sampler as module
from ddetr_cli.train.augment import augmented_size
from ddetr_cli.train.dataset import TrainingSet
from ddetr_cli.train.sampler import BatchSampler


def square(_epoch: int, indices: Sequence[int]) -> NDArray[np.int64]:
    return np.full((len(indices), 2), 64, dtype=np.int64)


def turned(_epoch: int, indices: Sequence[int]) -> NDArray[np.int64]:
    """Portraits and landscapes by turns."""
    return np.array([(64, 96) if index % 2 else (96, 64) for index in indices], dtype=np.int64)


def photos(epoch: int, indices: Sequence[int]) -> NDArray[np.int64]:
    """Photographs in COCO's usual sizes, as the authors augment them."""
    sizes = [(640, 480), (480, 640), (640, 427), (500, 375), (640, 640)]
    return np.array(
        [
            augmented_size(*sizes[index % 5], "paper", 800, np.random.default_rng((1, epoch, index)))
            for index in indices
        ],
        dtype=np.int64,
    )


def test_the_order_of_an_epoch_follows_from_seed_and_epoch() -> None:
    sampler = BatchSampler(50, photos, 4, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    assert len(first) == len(sampler) == 12 and all(len(batch) == 4 for batch in first)
    assert len({index for batch in first for index in batch}) == 48
    sampler.epoch = 1
    assert list(sampler) != first


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    assert [sorted(batch) for batch in BatchSampler(2, turned, 4, seed=3)] == [[0, 1]]


def test_portraits_and_landscapes_do_not_share_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_IMAGES", 64)
    mixed = sum(len({index % 2 for index in batch}) > 1 for batch in BatchSampler(128, turned, 4, seed=1))
    # At most one batch of each of the two windows holds the border between them.
    assert mixed <= 2


def test_pictures_of_one_shape_meet_others_in_every_epoch() -> None:
    sampler = BatchSampler(40, square, 2, seed=1)
    pairs = []
    for sampler.epoch in range(3):
        pairs.append({tuple(sorted(batch)) for batch in sampler})
    assert len(pairs[0] & pairs[1]) <= 3 and len(pairs[1] & pairs[2]) <= 3


@pytest.mark.parametrize(("batch_size", "least", "most"), [(2, 1.2, 1.06), (8, 1.6, 1.2)])
def test_padding_shrinks_to_what_windows_of_512_images_allow(batch_size: int, least: float, most: float) -> None:
    ours, shuffled = BatchSampler(2048, photos, batch_size, seed=1).padding(2048)
    assert shuffled > least and 1.0 <= ours < most


def test_padding_is_counted_by_hand() -> None:
    # One landscape and one portrait: both are padded to 96x96, of 64x96 pixels each.
    assert BatchSampler(2, turned, 2, seed=1).padding(2) == (1.5, 1.5)
    # One to a process: nothing is padded.
    assert BatchSampler(2, turned, 2, seed=1, processes=2).padding(2) == (1.0, 1.0)


@pytest.mark.parametrize("first", [0, 5, 16, 21])
def test_an_epoch_goes_on_at_any_of_its_steps(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_IMAGES", 32)
    sampler = BatchSampler(100, photos, 4, seed=3, accumulate=2)
    whole = list(sampler)
    sampler.first = first
    assert list(sampler) == whole[2 * first :] and len(sampler) == 50 - 2 * first


def test_going_on_late_in_an_epoch_asks_for_no_earlier_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_IMAGES", 16)
    asked: list[int] = []

    def counted(_epoch: int, indices: Sequence[int]) -> Any:
        asked.append(len(indices))
        return square(_epoch, indices)

    sampler = BatchSampler(96, counted, 1, seed=3)
    sampler.first = 90
    assert len(list(sampler)) == 6 and asked == [16]


def test_the_parts_of_all_processes_and_passes_make_up_the_batch_of_one_process() -> None:
    whole = list(BatchSampler(41, photos, 7, seed=3))
    shares = [list(BatchSampler(41, photos, 7, seed=3, accumulate=2, processes=2, index=i)) for i in range(2)]
    assert [len(share) for share in shares] == [10, 10]
    for step, batch in enumerate(whole):
        parts = [share[2 * step + number] for share in shares for number in range(2)]
        assert [index for part in parts for index in part] == batch
        assert sorted(len(part) for part in parts) == [1, 2, 2, 2]


def test_a_batch_smaller_than_its_parts_is_refused() -> None:
    with pytest.raises(UsageError, match="3 images cannot be divided among 2 processes with 2 passes each"):
        BatchSampler(9, square, 3, seed=1, accumulate=2, processes=2)


def test_padding_of_coco_pictures_in_the_authors_augmentation_falls_below_half_of_what_it_was() -> None:
    data = os.environ.get("DDETR_TEST_DATA")
    if not data:
        pytest.skip("DDETR_TEST_DATA is not set")
    annotations = read_annotations(Path(data) / "coco_train40" / "annotations" / "instances.json", purpose="train")
    ours, shuffled = [], []
    for seed in range(10):
        samples = TrainingSet(
            annotations, Path(data), annotations.class_table(), augmentation="paper", image_size=800, seed=seed
        )
        before_after = BatchSampler(40, samples.shapes, 2, seed).padding(40)
        ours.append(before_after[0])
        shuffled.append(before_after[1])
    # 1.29 and 1.12 of forty pictures; of thousands, with windows of 512, less is left.
    assert np.mean(shuffled) > 1.24 and np.mean(ours) < 1.15
    assert np.mean(ours) - 1 < 0.5 * (np.mean(shuffled) - 1)
