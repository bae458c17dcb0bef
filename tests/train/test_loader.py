from __future__ import annotations

import errno
import multiprocessing.process
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr_cli.data.coco import read_annotations
from ddetr_cli.train import loader
from ddetr_cli.train.dataset import TrainingSet
from ddetr_cli.train.loader import open_batches, usable_workers
from ddetr_cli.train.sampler import BatchSampler


def test_little_shared_memory_lowers_the_number_of_readers(
    monkeypatch: pytest.MonkeyPatch, watcher: type[Any]
) -> None:
    progress = watcher()
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: 1 << 20)
    assert usable_workers(8, 2, 800, progress.warn) == 0
    (warning,) = progress.warnings
    assert "/dev/shm has 1 MiB" in warning and "0 of 8" in warning
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: 1 << 40)
    assert usable_workers(8, 2, 800, progress.warn) == 8
    assert len(progress.warnings) == 1


def test_few_open_files_lower_the_number_of_readers(monkeypatch: pytest.MonkeyPatch, watcher: type[Any]) -> None:
    progress = watcher()
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: 1 << 40)
    monkeypatch.setattr(loader, "_open_files", lambda: 64)
    assert usable_workers(2, 2, 64, progress.warn) == 0
    assert "the limit is 64 (ulimit -n)" in progress.warnings[0]


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: calls.append(limits))
    assert loader._open_files() == 4096 and calls == [(4096, 4096)]


@pytest.mark.parametrize("workers", [0, 1])
def test_where_no_process_can_be_started_the_pictures_are_read_here(
    workers: int, dozen: Path, monkeypatch: pytest.MonkeyPatch, watcher: type[Any]
) -> None:
    annotations = read_annotations(dozen / "annotations" / "train.json", purpose="train")
    data = TrainingSet(
        annotations, dozen / "images", annotations.class_table(), augmentation="paper", image_size=48, seed=1
    )
    sampler = BatchSampler(12, data.shapes, 3, seed=1)
    progress = watcher()

    def none_left(_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with open_batches(data, sampler, workers=0, pin_memory=False, warn=progress.warn) as batches:
        expected = [batch.pixels for batch in batches]
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", none_left)
    with open_batches(data, sampler, workers=workers, pin_memory=False, warn=progress.warn) as batches:
        found = [batch.pixels for batch in batches]
    assert len(found) == 4 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [("none to be had" in text) for text in progress.warnings] == [True] * workers
