from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ddetr_cli.inference import predictor as room
from ddetr_cli.inference.batching import MOST_TOGETHER, batch_that_fits, measured_batch_size
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.weights import LoadedModel

DEVICE = torch.device("cuda", 0)
MiB = 1 << 20


@pytest.mark.parametrize(
    ("free", "one", "runs_kept", "expected"),
    [
        (1000, 100, 0, 8),  # four fifths of what is free
        (1000, 100, 1, 4),  # a graph of the same size is kept
        (1000, 100, 7, 1),
        (1000, 801, 0, 1),
        (1000, 5000, 0, 1),  # running out of memory is for the run itself to tell
        (0, 100, 0, 1),
        (10**12, 100, 0, MOST_TOGETHER),
        (1000, 0, 0, MOST_TOGETHER),
    ],
)
def test_as_many_run_together_as_fit(free: int, one: int, runs_kept: int, expected: int) -> None:
    assert batch_that_fits(free, one, runs_kept=runs_kept) == expected


class Card:
    """A GPU's allocator: 500 MiB of weights, a library's 200 MiB at the first run, 300 MiB while one runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, fails_at: int | None = None) -> None:
        self.allocated = self.peak = 500 * MiB
        self.runs, self.fails_at = 0, fails_at
        reserved = 1000 * MiB
        answers = {
            "memory_allocated": lambda _: self.allocated,
            "memory_reserved": lambda _: reserved,
            "max_memory_allocated": lambda _: self.peak,
            "reset_peak_memory_stats": self.forget,
            "mem_get_info": lambda _: (free, 10 * free),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def forget(self, _: torch.device) -> None:
        self.peak = self.allocated

    def run(self) -> bool:
        self.runs += 1
        if self.runs == self.fails_at:
            return False
        if self.runs == 1:
            self.allocated += 200 * MiB
        self.peak = max(self.peak, self.allocated + 300 * MiB + (1 << 40) * (self.runs == 1))
        return True


def test_what_one_picture_takes_is_measured_at_its_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2700 free and 300 held but unused by the allocator; 300 for one.
    card = Card(monkeypatch, free=2700 * MiB)
    assert measured_batch_size(card.run, DEVICE) == 8
    assert card.runs == 2


@pytest.mark.parametrize("fails_at", [1, 2])
def test_where_not_even_one_fits_it_is_one(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_batch_size(Card(monkeypatch, 2700 * MiB, fails_at).run, DEVICE) == 1


def test_auto_measures_a_picture_of_the_largest_size_on_a_gpu(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []
    monkeypatch.setattr(Predictor, "_run_batch", lambda _, images: shapes.append(images[0].pixels.shape) or [])

    def measured(run_one: object, device: torch.device, *, runs_kept: int) -> int:
        assert callable(run_one) and run_one() is True and device.type == "meta" and runs_kept == 0
        return 5

    monkeypatch.setattr(room, "measured_batch_size", measured)
    with_own_model = replace(loaded, model=torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    predictor = Predictor(with_own_model, device=torch.device("meta"), image_size=96, batch_size="auto")
    assert predictor.batch_size == 5
    assert shapes == [(3, 96, 159)]


def test_on_a_cpu_auto_is_one_by_one(loaded: LoadedModel) -> None:
    assert Predictor(loaded, device="cpu", batch_size="auto").batch_size == 1


def test_a_gpu_takes_the_batch_that_auto_found(loaded: LoadedModel) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    predictor = Predictor(loaded, device="cuda", batch_size="auto")
    assert 1 <= predictor.batch_size <= MOST_TOGETHER
    torch.cuda.reset_peak_memory_stats()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    predictor.forward(torch.zeros(predictor.batch_size, 3, 64, 106))
    assert torch.cuda.max_memory_allocated() - before < free
    loaded.model.cpu()
