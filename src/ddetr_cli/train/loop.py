"""The training loop: one pass over the data at a time.

Library code: what happens is told to a ``Progress``, never printed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddetr_cli.errors import DivergedError
from ddetr_cli.train.criterion import Criterion
from ddetr_cli.train.dataset import Batch
from ddetr_cli.train.recipe import AveragedWeights, Recipe, rate_factor

MAX_BAD_STEPS = 10  # steps in a row without a finite loss and gradient before a run counts as diverged


class Progress(Protocol):
    """What a run tells whoever watches it."""

    def note(self, text: str) -> None:
        """Something worth one line that is as it should be."""

    def warn(self, text: str) -> None:
        """Something the user may not expect, worth a line even where little is said."""

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """One optimizer step of ``steps`` in this epoch is done."""

    def epoch(self, row: dict[str, Any]) -> None:
        """One epoch is done and validated; ``row`` is the line written to metrics.jsonl."""


@dataclass
class EpochResult:
    """Means over the steps of one epoch."""

    losses: dict[str, float]
    skipped_steps: int
    seconds: float
    images: int


class Trainer:
    """Model, optimizer and averages of one run, and the step that changes them."""

    def __init__(self, model: nn.Module, recipe: Recipe, groups: list[dict[str, Any]], device: torch.device) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.recipe, self.device = recipe, device
        self.criterion = Criterion()
        self.optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = AveragedWeights(model, recipe.ema_decay) if recipe.ema_decay else None
        self.steps_done = 0
        self._bad_in_a_row = 0

    def train_epoch(self, batches: Iterable[Batch], epoch: int, steps: int, progress: Progress) -> EpochResult:
        """One pass over ``batches`` (``steps`` of them). Raises DivergedError when the loss stays non-finite.

        A step whose loss or gradient is not finite changes nothing and is counted.
        """
        self.model.train()
        totals: dict[str, float] = {}
        skipped = images = counted = 0
        start = time.perf_counter()
        for number, batch in enumerate(batches, start=1):
            factor = rate_factor(self.recipe, self.steps_done, steps)
            for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = rate * factor
            loss, terms = self._step(batch)
            self.steps_done += 1
            images += len(batch.targets)
            if math.isfinite(loss):
                counted += 1
                totals["loss"] = totals.get("loss", 0.0) + loss
                for name, value in terms.items():
                    totals[name] = totals.get(name, 0.0) + value
            else:
                skipped += 1
            progress.step(epoch, number, steps, loss)
        means = {name: value / max(counted, 1) for name, value in totals.items()}
        return EpochResult(means, skipped, time.perf_counter() - start, images)

    def _step(self, batch: Batch) -> tuple[float, dict[str, float]]:
        pixels = batch.pixels.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        is_padding = None if batch.is_padding is None else batch.is_padding.to(self.device, non_blocking=True)
        targets = [target.to(self.device) for target in batch.targets]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            output = self.model(pixels, is_padding)
        total, terms = self.criterion(output, targets)
        values: Tensor = torch.stack([total.detach(), *terms.values()]).detach().cpu()
        loss = float(values[0])
        self.optimizer.zero_grad(set_to_none=True)
        if math.isfinite(loss):
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
            if not math.isfinite(float(norm)):
                loss = math.nan  # a finite loss can still have gradients that would turn every weight into NaN
        if not math.isfinite(loss):
            self._bad_in_a_row += 1
            if self._bad_in_a_row >= MAX_BAD_STEPS:
                raise DivergedError(
                    f"training: the loss or its gradient was not finite for {MAX_BAD_STEPS} steps in a row. "
                    "Lower --learning-rate; the last good checkpoint is kept."
                )
            return loss, {}
        self._bad_in_a_row = 0
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        return loss, dict(zip(terms, values[1:].tolist(), strict=True))
