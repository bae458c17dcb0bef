"""What the tests of the examples share: the programs under test on the path, an untrained model, two pictures."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

ENTRY = "import sys; from ddetr_cli.cli.app import main; sys.exit(main())"
QUERIES, CLASSES = 6, ("circle", "square")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose ``ddetr`` and ``python3`` are those under test, installed or not."""
    folder = tmp_path_factory.mktemp("bin")
    for name, arguments in (
        ("ddetr", f"-c '{ENTRY}'"),
        ("python3", ""),
        ("python", ""),
        ("torchrun", "-m torch.distributed.run"),
    ):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector of two classes: at threshold 0 it finds a known number of things in any picture."""
    from ddetr_cli.classes import ClassTable
    from ddetr_cli.model.build import build_detector
    from ddetr_cli.presets import get_preset
    from ddetr_cli.weights import save_checkpoint

    path = tmp_path_factory.mktemp("model") / "untrained.safetensors"
    config = get_preset("tiny", classes=len(CLASSES), queries=QUERIES, image_size=64)
    save_checkpoint(path, build_detector(config), ClassTable((1, 2), CLASSES))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (80, 60), (90, 120, 150)).save(folder / name)
    return folder
