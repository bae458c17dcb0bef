from __future__ import annotations

import errno
import multiprocessing.process
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr_cli.data.coco import read_annotations
from ddetr_cli.errors import DatasetError
from ddetr_cli.train import loader
from ddetr_cli.train.dataset import Batch, TrainingSet
from ddetr_cli.train.loader import SideStream, open_batches, sent_ahead, usable_workers
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

    with open_batches(data, sampler, workers=0, device=torch.device("cpu"), warn=progress.warn) as batches:
        expected = [batch.pixels for batch in batches]
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", none_left)
    with open_batches(data, sampler, workers=workers, device=torch.device("cpu"), warn=progress.warn) as batches:
        found = [batch.pixels for batch in batches]
    assert len(found) == 4 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [("none to be had" in text) for text in progress.warnings] == [True] * workers


def _numbered(number: int) -> Batch:
    return Batch(torch.full((1, 3, 2, 2), float(number)), None, [])


class Diary:
    """A sender that goes nowhere, and writes down what it does."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def send(self, batch: Batch) -> Batch:
        self.lines.append(f"send {int(batch.pixels[0, 0, 0, 0])}")
        return batch

    def receive(self, sent: Any) -> Batch:
        self.lines.append(f"receive {int(sent.pixels[0, 0, 0, 0])}")
        return sent


def test_the_next_batch_is_on_its_way_while_one_is_worked_at() -> None:
    diary = Diary()
    for batch in sent_ahead(iter([_numbered(0), _numbered(1), _numbered(2)]), diary):
        diary.lines.append(f"work {int(batch.pixels[0, 0, 0, 0])}")
    assert diary.lines == [
        "send 0", "send 1", "receive 0", "work 0", "send 2", "receive 1", "work 1", "receive 2", "work 2",
    ]  # fmt: skip


def test_an_error_of_the_next_batch_does_not_cost_the_one_before() -> None:
    def batches() -> Iterator[Batch]:
        yield _numbered(0)
        raise DatasetError("gone")

    found = sent_ahead(batches(), Diary())
    assert next(found).pixels[0, 0, 0, 0] == 0
    with pytest.raises(DatasetError, match="gone"):
        next(found)


def test_no_batch_is_no_batch() -> None:
    assert list(sent_ahead(iter([]), Diary())) == []


@pytest.mark.usefixtures("require_cuda")
def test_a_gpu_computes_with_whole_batches_that_came_beside_its_work() -> None:
    device = torch.device("cuda")
    sizes = [(2, 3, 600 + 40 * n, 800) for n in range(12)]
    given = [Batch(torch.randn(size), torch.rand(size[0], *size[2:]) > 0.5, []).pin_memory() for size in sizes]
    sums = []
    for batch in sent_ahead(iter(given), SideStream(device)):
        assert batch.is_padding is not None
        sums.append((batch.pixels * ~batch.is_padding[:, None]).double().sum())
    expected = [(b.pixels * ~b.is_padding[:, None]).double().sum() for b in given if b.is_padding is not None]
    assert torch.allclose(torch.stack(sums).cpu(), torch.stack(expected), rtol=1e-6)
