"""Reference numbers for the tests of the model: small files in the repository, larger ones from DDETR_TEST_DATA."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parents[1] / "golden"
Golden = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="session")
def golden() -> Golden:
    """Reads one file of numbers of the authors' code as tensors, or skips where it is not on this machine."""

    def read(name: str) -> dict[str, Tensor]:
        path = HERE / f"{name}.npz"
        if not path.is_file():
            data = os.environ.get("DDETR_TEST_DATA")
            path = Path(data or "/nonexistent") / "authors_golden" / f"{name}.npz"
            if not path.is_file():
                pytest.skip(f"{name}.npz is not in tests/golden, and DDETR_TEST_DATA names no folder that has it")
        with np.load(path) as arrays:
            return {key: _tensor(arrays[key]) for key in arrays.files}

    return read


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
