"""bf16 autocast with its constants folded and its own dropout, beside fp32: the same training, step for step."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

from ddetr_cli.model.backbone import BACKBONES, FrozenBatchNorm2d
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import PRESETS
from ddetr_cli.train.criterion import Criterion
from ddetr_cli.train.dataset import Batch
from ddetr_cli.train.loop import Trainer
from ddetr_cli.train.matcher import Target
from ddetr_cli.train.recipe import Recipe, parameter_groups

STEPS = 100


def _batches(count: int) -> list[Batch]:
    """Two pictures each of one bright square on noise, which says where the object is."""
    numbers = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(count):
        pixels = 0.3 * torch.randn(2, 3, 64, 96, generator=numbers)
        targets = []
        for picture in pixels:
            x, y = (int(torch.randint(0, room, (), generator=numbers)) for room in (72, 40))
            label = int(torch.randint(0, 2, (), generator=numbers))
            picture[label, y : y + 24, x : x + 24] += 2.0
            box = torch.tensor([[(x + 12) / 96, (y + 12) / 64, 24 / 96, 24 / 64]])
            targets.append(Target(torch.tensor([label]), box))
        batches.append(Batch(pixels, None, targets))
    return batches


def _losses(precision: str, batches: list[Batch], dropout: float) -> list[float]:
    config = replace(
        PRESETS["tiny-plain"], hidden_dim=64, encoder_layers=1, decoder_layers=2, ffn_dim=64, queries=10, classes=2,
        dropout=dropout,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_detector(config)
    recipe = Recipe(epochs=1, batch_size=2, learning_rate=3e-4, backbone_rate=3e-4, precision=precision)  # type: ignore[arg-type]
    trainer = Trainer(model, Criterion(config.family), recipe, parameter_groups(model, recipe), torch.device("cpu"))
    trainer.train_mode()
    return [trainer.step([batches[step % len(batches)]]).loss for step in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_losses_agree_over_a_hundred_steps(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = replace(BACKBONES["resnet-tiny"], norm=FrozenBatchNorm2d, depths=(1, 1, 1, 1), widths=(16, 16, 32, 32),
                    stem_channels=16)  # fmt: skip
    monkeypatch.setitem(BACKBONES, "resnet-tiny", trunk)
    batches = _batches(10)
    exact, fast = (_losses(precision, batches, dropout) for precision in ("fp32", "bf16"))
    tens = [statistics.fmean(fast[i : i + 10]) / statistics.fmean(exact[i : i + 10]) - 1 for i in range(0, STEPS, 10)]
    assert fast[0] == pytest.approx(exact[0], rel=0.01 if not dropout else 0.05)
    # 16 bits and, with dropout, other random numbers: passes over the ten batches agree within five per cent.
    assert max(abs(difference) for difference in tens) < 0.05, tens
    assert statistics.fmean(exact[-10:]) < 0.8 * statistics.fmean(exact[:10])  # there was something to learn
