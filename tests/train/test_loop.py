from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.train.dataset import Batch
from ddetr_cli.train.loop import Trainer
from ddetr_cli.train.matcher import Target
from ddetr_cli.train.recipe import Recipe


class Explosive(nn.Module):
    """A detector of one query whose gradient is infinite for pictures of zeros, and whose loss is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, pixels: Tensor, is_padding: Tensor | None) -> DetectorOutput:
        x = (self.weight * pixels.mean()).sqrt()  # d sqrt(0) is infinite
        return DetectorOutput(x.expand(1, 1, 2), torch.full((1, 1, 4), 0.5))


class Steps:
    """Keeps the losses of the steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def epoch(self, row: dict[str, Any]) -> None: ...
    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        self.losses.append(loss)


def _batch(value: float) -> Batch:
    target = Target(torch.empty(0, dtype=torch.long), torch.empty(0, 4))
    return Batch(torch.full((1, 3, 4, 4), value), None, [target])


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted() -> None:
    model = Explosive()
    recipe = Recipe(epochs=9, batch_size=1, learning_rate=0.1, backbone_rate=0.1, ema_decay=0.5)
    trainer = Trainer(model, recipe, [{"params": list(model.parameters()), "lr": 0.1}], torch.device("cpu"))
    steps = Steps()
    result = trainer.train_epoch([_batch(0.0)], 1, 1, steps)
    assert result.skipped_steps == 1 and result.losses == {}
    assert not torch.isfinite(torch.tensor(steps.losses)).any()
    assert model.weight.item() == 1.0
    assert trainer.average is not None and trainer.average.steps == 0

    result = trainer.train_epoch([_batch(1.0)], 1, 1, steps)
    assert result.skipped_steps == 0 and result.losses["loss"] > 0
    # AdamW's first step is the rate itself, downwards: fewer objects; and decay of 1e-4 * 0.1.
    assert model.weight.item() == pytest.approx(0.9, abs=1e-4)
