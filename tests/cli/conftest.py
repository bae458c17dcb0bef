"""What the tests of the commands share: a checkpoint that answers in milliseconds, and photos for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.classes import ClassTable
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import get_preset
from ddetr_cli.weights import save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small checkpoint with random weights: 40 queries, 3 classes, so 100 detections in every picture."""
    config = get_preset(
        "tiny",
        hidden_dim=64,
        heads=2,
        encoder_layers=1,
        decoder_layers=1,
        ffn_dim=32,
        queries=40,
        classes=3,
        image_size=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = build_detector(config).eval()
        for head in detector.class_embed:
            torch.nn.init.normal_(head.get_parameter("weight"), std=0.5)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_checkpoint(path, detector, ClassTable((1, 2, 7), ("cat", "dog\x1b[31m", None)))
    return str(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures of noise, two of them in a folder of their own."""
    folder = tmp_path / "in"
    for number, (name, size) in enumerate({"a.jpg": (64, 48), "sub/b.png": (48, 64), "sub/c.tif": (80, 60)}.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / name)
    return folder
