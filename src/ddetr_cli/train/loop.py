"""One training step, and what a run tells whoever watches it.

Library code: what happens is told to a ``Progress``, never printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddetr_cli.distributed import Ranks, others_alive
from ddetr_cli.errors import DivergedError
from ddetr_cli.train.criterion import Criterion
from ddetr_cli.train.dataset import Batch
from ddetr_cli.train.recipe import AveragedWeights, Recipe
from ddetr_cli.transfer import Download

MAX_BAD_STEPS = 10  # steps in a row without a finite loss and gradient before a run counts as diverged


@dataclass(frozen=True)
class Pace:
    """How fast a run is at the moment, and what holds it up.

    ``seconds_left`` of the whole run, validations included, is None until there is something to reckon with.
    ``bottleneck`` is ``data``: steps wait for pictures; ``host``: the device waits for Python; or ``device``.
    """

    epochs: int
    images_per_second: float
    seconds_left: float | None
    bottleneck: str


class Progress(Protocol):
    """What a run tells whoever watches it."""

    def pace(self, pace: Pace) -> None:
        """Before each step is told of."""

    def note(self, text: str) -> None:
        """Something worth one line that is as it should be."""

    def warn(self, text: str) -> None:
        """Something the user may not expect, worth a line even where little is said."""

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """One optimizer step of ``steps`` in this epoch is done."""

    def epoch(self, row: dict[str, Any]) -> None:
        """One epoch is done and validated; ``row`` is the line written to metrics.jsonl."""


class StepResult:
    """The loss of one step over all processes, and its unweighted terms; a skipped step has no terms.

    A GPU still works at the step when it is handed out: reading these waits for it, unless ``is_known``.
    ``device_seconds``: for how long the host waited for the device during the step.
    """

    def __init__(self, names: Sequence[str], numbers: Download, device_seconds: float) -> None:
        self._names, self._download, self.device_seconds = names, numbers, device_seconds

    @property
    def is_known(self) -> bool:
        """Whether the device has come so far."""
        return self._download.is_there

    @cached_property
    def _numbers(self) -> list[float]:
        """Loss, terms, norm of the gradient."""
        numbers: list[float] = self._download.wait().tolist()
        return numbers

    @property
    def loss(self) -> float:
        """Not finite where the step was skipped."""
        return self._numbers[0] if math.isfinite(self._numbers[-1]) else math.nan

    @property
    def terms(self) -> dict[str, float]:
        return dict(zip(self._names, self._numbers[1:-1], strict=True)) if math.isfinite(self.loss) else {}


class Trainer:
    """Model, optimizer and averages of one run, and the step that changes them.

    A GPU is waited for once a pass, by the matching: how a step went is learnt late (``is_late``), while the next one
    runs or by ``settle``; until then ``average`` and ``bad_in_a_row`` lack it.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        recipe: Recipe,
        groups: list[dict[str, Any]],
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.criterion, self.recipe, self.device = criterion, recipe, device
        self.ranks = ranks or Ranks()
        self.optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = AveragedWeights(model, recipe.ema_decay) if recipe.ema_decay else None
        self.steps_done = 0
        self.bad_in_a_row = 0
        # False while weights, optimizer and averages belong to different steps, and must not be saved.
        self.is_between_steps = True
        self._network: nn.Module = self.model
        if self.ranks.count > 1:
            # The running statistics of batch-norm are averaged below, where all see the same.
            with others_alive():
                self._network = DistributedDataParallel(
                    self.model, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        norms: dict[str, nn.Module] = {
            name: m for name, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        }
        self._frozen_norms = [m for m in norms.values() if not any(p.requires_grad for p in m.parameters())]
        self._statistics: dict[str, Tensor] = {
            f"{name}.{key}": buffer
            for name, m in norms.items()
            if m not in self._frozen_norms
            for key, buffer in m.named_buffers()
        }
        self._statistics_before = {name: torch.empty_like(b) for name, b in self._statistics.items()}
        self.is_late = device.type != "cpu"
        self._unsettled: StepResult | None = None

    def train_mode(self) -> None:
        """Dropout on, and the batch-norms that train gather statistics: before the steps of an epoch."""
        self._network.train()
        for norm in self._frozen_norms:
            norm.eval()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The model in evaluation mode, with its averaged weights where there are any, for the block."""
        own = None
        if self.average is not None:
            own = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(self.average.state)
        self.model.eval()
        try:
            yield
        finally:
            if own is not None:
                self.model.load_state_dict(own)

    def step(self, parts: Sequence[Batch], *, factor: float = 1.0, num_boxes: float | None = None) -> StepResult:
        """Learn from ``parts``, one pass each, at ``factor`` times the rates.

        ``num_boxes`` is what the losses are divided by: the objects of the whole step, the mean over processes. A
        step whose loss or gradient is not finite, or that fails, changes nothing; raises DivergedError after
        ``MAX_BAD_STEPS`` of the former in a row, on a GPU when the next step has begun or by ``settle``.
        """
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        if num_boxes is None:
            num_boxes = max(1, sum(len(target.labels) for part in parts for target in part.targets))
        # Dropout draws from torch's generator: seeded at every step, a resumed run repeats an uninterrupted one.
        torch.manual_seed(_seed(self.recipe.seed, self.steps_done, self.ranks.index))
        with self._statistics_kept():
            names, values, waited = self._gradients(parts, num_boxes)
            # The matching has waited for all that the step before gave the device to do.
            self._settle(self._statistics_before)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm).detach()
            self.ranks.mean_(values)
        # The norm is that of the averaged gradient: all processes are of one mind.
        is_bad = ~(values[0].isfinite() & norm.isfinite())
        self.is_between_steps = False
        # What GradScaler tells the fused AdamW too, which then changes nothing, without the host's knowing.
        self.optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self._average_statistics()
        for name, buffer in self._statistics.items():
            buffer.copy_(torch.where(is_bad, self._statistics_before[name], buffer))
        self.steps_done += 1
        self.is_between_steps = True
        numbers = Download(torch.cat((values, norm.to(values).reshape(1))))
        result = self._unsettled = StepResult(names, numbers, waited)
        if not self.is_late:
            self.settle()
        return result

    def settle(self) -> None:
        """Wait for the newest step and take into account how it went. Raises DivergedError, as ``step``, once."""
        self._settle({})

    def _settle(self, statistics: Mapping[str, Tensor]) -> None:
        """``settle``; those ``statistics`` of batch-norm are the step's that the model itself has left behind."""
        if self._unsettled is None:
            return
        is_good = math.isfinite(self._unsettled.loss)
        self._unsettled = None
        self.bad_in_a_row = 0 if is_good else self.bad_in_a_row + 1
        if is_good and self.average is not None:
            self.is_between_steps = False
            self.average.update({**self.model.state_dict(), **statistics})
            self.is_between_steps = True
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            raise DivergedError(
                f"training: the loss or its gradient was not finite for {MAX_BAD_STEPS} steps in a row. "
                "Lower --learning-rate."
            )

    def _gradients(self, parts: Sequence[Batch], num_boxes: float) -> tuple[list[str], Tensor, float]:
        """Sum the gradients of all parts.

        Returns the names of the terms, the total loss with the terms, and for how long the device was waited for.
        """
        self.optimizer.zero_grad(set_to_none=True)
        images = sum(len(part.targets) for part in parts)
        summed: Tensor | None = None
        names: list[str] = []
        waited = 0.0
        for number, part in enumerate(parts, start=1):
            there = part.to(self.device)
            with self._exchange(is_last=number == len(parts)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
                    output = self._network(there.pixels, there.is_padding)
                total, terms = self.criterion(output, part.targets, num_boxes, share=len(part.targets) / images)
                waited += self.criterion.waited_seconds
                total.backward()
            values = torch.stack([total.detach(), *(term.detach() for term in terms.values())])
            summed = values if summed is None else summed + values
            names = list(terms)
        if summed is None:
            raise ValueError("a step needs a batch")
        return names, summed, waited

    @contextmanager
    def _exchange(self, *, is_last: bool) -> Iterator[None]:
        """Gradients are averaged over the processes with the last part's, not before."""
        network = self._network
        if not isinstance(network, DistributedDataParallel):
            yield
            return
        quiet: AbstractContextManager[Any] = nullcontext() if is_last else network.no_sync()
        with others_alive(), quiet:
            yield

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """Keeps what batch-norm had; a failure inside puts it back."""
        now, before = list(self._statistics.values()), list(self._statistics_before.values())
        if now:
            torch._foreach_copy_(before, now)
        try:
            yield
        except BaseException:
            if now:
                torch._foreach_copy_(now, before)
            raise

    @torch.no_grad()
    def _average_statistics(self) -> None:
        means = [b for b in self._statistics.values() if b.is_floating_point()]  # all have counted the same batches
        if self.ranks.count > 1 and means:
            flat = torch.cat([b.flatten() for b in means])
            self.ranks.mean_(flat)
            torch._foreach_copy_(means, list(flat.split([b.numel() for b in means])))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
