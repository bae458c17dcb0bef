"""The self-test lets right kernels pass and stops every kind of wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import reference
from ddetr_cli.ops.selftest import check_kernels

CPU = torch.device("cpu")


class Fake:
    """The reference with one result spoilt."""

    path = Path("libfake.so")

    def __init__(self, spoilt: int | None = None, dtype: torch.dtype | None = None, by: float = 0.05) -> None:
        self.spoilt, self.dtype, self.by = spoilt, dtype, by

    def _spoil(self, index: int, result: Tensor, dtype: torch.dtype) -> Tensor:
        if index == self.spoilt and self.dtype in (None, dtype):
            result.view(-1)[7] += self.by * result.abs().max().clamp_min(1).item()
        return result

    def forward(self, value: Tensor, *others: Any) -> Tensor:
        return self._spoil(0, reference.msda_forward(value, *others), value.dtype)

    def backward(self, grad_output: Tensor, *others: Any) -> tuple[Tensor, ...]:
        results = reference.msda_backward(grad_output, *others)
        return tuple(self._spoil(1 + i, result, grad_output.dtype) for i, result in enumerate(results))

    def fused(self, value: Tensor, *others: Any) -> None:
        *inputs, out = others
        out.copy_(self._spoil(4, reference.msda_fused(value, *inputs), value.dtype))


def check(kernels: Fake) -> None:
    check_kernels(kernels, CPU)  # type: ignore[arg-type]


def test_right_kernels_pass() -> None:
    check(Fake())


@pytest.mark.parametrize(
    ("spoilt", "name"),
    [
        (0, "output in"),
        (1, "gradient of the value in"),
        (2, "gradient of the locations in"),
        (3, "gradient of the weights in"),
        (4, "output of the fused form in"),
    ],
)
def test_one_wrong_number_of_any_result_is_found_and_named(spoilt: int, name: str) -> None:
    with pytest.raises(KernelError, match=f"wrong {name} torch.float32 on cpu"):
        check(Fake(spoilt))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_wrong_number_in_one_dtype_alone_is_found(dtype: torch.dtype) -> None:
    with pytest.raises(KernelError, match=str(dtype)):
        check(Fake(0, dtype))


def test_a_result_that_is_not_a_number_is_found() -> None:
    with pytest.raises(KernelError, match="wrong output"):
        check(Fake(0, by=float("nan")))
