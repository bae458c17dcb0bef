"""How a model is trained: every number in one frozen record, written to the run's config.json.

``paper_recipe`` is arXiv:2010.04159's and ``detr_recipe`` DETR's, both with the learning rates scaled linearly to the
batch; ``scratch_recipe`` is for presets whose trunk starts from random weights, and for few pictures; the two
``finetune`` recipes go on from a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from ddetr_cli.train.augment import AugmentName

# The batches the published learning rates belong to; DETR's is that of its 300 epochs on one machine of 8 GPUs.
PAPER_BATCH, DETR_BATCH = 32, 16

Freeze = Literal["none", "backbone", "encoder", "transformer"]
# The beginnings of the names of what each of them keeps as it is; ``transformer`` leaves heads and queries to learn.
FROZEN: dict[Freeze, tuple[str, ...]] = {
    "none": (),
    "backbone": ("backbone.",),
    "encoder": ("backbone.", "input_proj.", "transformer.encoder.", "transformer.level_embed"),
    "transformer": ("backbone.", "input_proj.", "transformer."),
}


@dataclass(frozen=True)
class Recipe:
    """Learning rates are those of one step at ``batch_size``: the images of a step, over all passes and processes."""

    epochs: int
    batch_size: int
    learning_rate: float
    backbone_rate: float
    offset_factor: float = 0.1  # sampling offsets and reference points learn at this share of the rate
    weight_decay: float = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    drop_at: float = 0.8  # step: the rate falls to a tenth after this share of the epochs (the paper's 40 of 50)
    warmup_steps: int = 0
    clip_norm: float = 0.1
    augmentation: AugmentName = "paper"
    ema_decay: float = 0.0  # 0: the weights of the last step are the model
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulate: int = 1  # passes that the images of a step are divided into, to save memory
    freeze: Freeze = "none"
    patience: int = 0  # validations without a better AP after which a run ends; 0: never
    proposal_matches: int = 1  # proposals that an object is matched to in the first stage; 1: the authors' loss
    seed: int = 42

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def paper_recipe(*, epochs: int = 50, batch_size: int = 2, seed: int = 42, **changes: Any) -> Recipe:
    """The authors' recipe: lr 2e-4 and trunk 2e-5 at batch 32, one drop at 80 %."""
    scale = batch_size / PAPER_BATCH
    values: dict[str, Any] = {"learning_rate": 2e-4 * scale, "backbone_rate": 2e-5 * scale} | changes
    return Recipe(epochs=epochs, batch_size=batch_size, seed=seed, **values)


def detr_recipe(*, epochs: int = 300, batch_size: int = 2, seed: int = 42, **changes: Any) -> Recipe:
    """DETR's recipe: lr 1e-4 and trunk 1e-5 at batch 16, one drop at two thirds (200 of 300)."""
    scale = batch_size / DETR_BATCH
    values: dict[str, Any] = {
        "learning_rate": 1e-4 * scale,
        "backbone_rate": 1e-5 * scale,
        "drop_at": 2 / 3,
    } | changes
    return Recipe(epochs=epochs, batch_size=batch_size, seed=seed, **values)


def scratch_recipe(*, epochs: int = 100, batch_size: int = 8, seed: int = 42, **changes: Any) -> Recipe:
    """For ``tiny``: one rate for everything, warm-up and cosine, averaged weights, stronger augmentation."""
    values: dict[str, Any] = {
        "learning_rate": 5e-4 * math.sqrt(batch_size / 8),
        "backbone_rate": 5e-4 * math.sqrt(batch_size / 8),
        "schedule": "cosine",
        "warmup_steps": 100,
        "ema_decay": 0.997,
        "augmentation": "jitter",
    } | changes
    return Recipe(epochs=epochs, batch_size=batch_size, seed=seed, **values)


def finetune_recipe(*, epochs: int = 25, batch_size: int = 2, seed: int = 42, **changes: Any) -> Recipe:
    """For a trained model with a pretrained trunk, on other pictures: half the epochs and a short warm-up.

    The rate is the paper's of batch 8, but scaled with the root of the batch, as suits AdamW and few steps; the
    cosine and the averaged weights spare choosing when to drop it.
    """
    values: dict[str, Any] = {
        "learning_rate": 5e-5 * math.sqrt(batch_size / 8),
        "backbone_rate": 5e-6 * math.sqrt(batch_size / 8),
        "schedule": "cosine",
        "warmup_steps": 100,
        "ema_decay": 0.997,
    } | changes
    return Recipe(epochs=epochs, batch_size=batch_size, seed=seed, **values)


def finetune_scratch_recipe(*, epochs: int = 40, batch_size: int = 8, seed: int = 42, **changes: Any) -> Recipe:
    """For a trained ``tiny``: ``scratch_recipe`` at six tenths of the rate and in four tenths of the epochs.

    A new class head needs a rate of that order; the trunk shares it, because it has seen as little as the rest.
    """
    rate = 3e-4 * math.sqrt(batch_size / 8)
    values: dict[str, Any] = {"learning_rate": rate, "backbone_rate": rate} | changes
    return scratch_recipe(epochs=epochs, batch_size=batch_size, seed=seed, **values)


def freeze_parameters(model: nn.Module, freeze: Freeze) -> None:
    """Have the parameters that ``freeze`` names keep their values, on top of those that never train."""
    for name, parameter in model.named_parameters():
        if FROZEN[freeze] and name.startswith(FROZEN[freeze]):
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Trainable parameters in the authors' groups: the rest, the trunk, and offsets with reference points if any."""
    groups: dict[str, list[nn.Parameter]] = {"rest": [], "backbone": [], "offsets": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("backbone."):
            groups["backbone"].append(parameter)
        elif "reference_points" in name or "sampling_offsets" in name:
            groups["offsets"].append(parameter)
        else:
            groups["rest"].append(parameter)
    rates = {
        "rest": recipe.learning_rate,
        "backbone": recipe.backbone_rate,
        "offsets": recipe.learning_rate * recipe.offset_factor,
    }
    return [{"params": p, "lr": rates[name], "name": name} for name, p in groups.items() if p]


def rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """What every group's rate is multiplied by at optimizer step ``step`` (from 0, over all epochs)."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    if recipe.schedule == "step":
        return warm * (0.1 if step >= round(recipe.epochs * recipe.drop_at) * steps_per_epoch else 1.0)
    progress = min(1.0, step / max(1, recipe.epochs * steps_per_epoch))
    return warm * max(0.01, 0.5 * (1 + math.cos(math.pi * progress)))


class AveragedWeights:
    """Exponential moving average of a model's parameters and buffers; early steps average less."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, state: Mapping[str, torch.Tensor]) -> None:
        """Move the average towards the ``state`` of the model after a step."""
        self.steps += 1
        keep = min(self.decay, self.steps / (10 + self.steps))
        ours, theirs = [], []
        for name, tensor in state.items():
            if tensor.is_floating_point():
                ours.append(self.state[name])
                theirs.append(tensor.detach())
            else:
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(ours, theirs, 1 - keep)

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Go on from stored averages, wherever they lie now: ours stay on the model's device."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self.steps = steps
