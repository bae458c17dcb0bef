"""A small Deformable DETR on a ResNet-50, in the authors' layout, for the tests that read foreign files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr_cli.model.detector import build_detector
from ddetr_cli.presets import ModelConfig
from ddetr_cli.weights.layouts import to_authors

# Half the memory and the time of every test: the tests of the numbers themselves say so and use float32.
SMALL = ModelConfig(
    "custom", hidden_dim=32, encoder_layers=1, decoder_layers=2, ffn_dim=32, queries=7, classes=5, image_size=800
)

Authors = Callable[..., Path]


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    """Random tensors under the authors' names, as float16; every number of a layer differs from its neighbours'."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = build_detector(config)
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand(tensor.shape) * 0.1)
    return to_authors({name: tensor.half() for name, tensor in model.state_dict().items()}, config)


@pytest.fixture(scope="session")
def states() -> Callable[..., dict[str, Tensor]]:
    """Random states by configuration, each made once."""
    made: dict[ModelConfig, dict[str, Tensor]] = {}

    def state(**changes: Any) -> dict[str, Tensor]:
        config = replace(SMALL, **changes)
        if config not in made:
            made[config] = random_state(config)
        return dict(made[config])

    return state


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a state as the authors' ``.pth``; keyword arguments become their ``args``."""

    def write(state: Mapping[str, Tensor], name: str = "checkpoint.pth", **arguments: Any) -> Path:
        path = tmp_path / name
        content = {"model": dict(state), "epoch": 49}
        torch.save(content | ({"args": argparse.Namespace(**arguments)} if arguments else {}), path)
        return path

    return write
