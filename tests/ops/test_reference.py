"""The reference against autograd's derivatives of its own forward; its values are tested with the others'."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ddetr_cli.ops import reference


def test_the_written_out_gradients_equal_those_of_autograd(case: Any) -> None:
    value, level_hw, xy, weights = case.inputs()
    if xy.numel() > 0:
        xy.view(-1)[0] = math.nan
        weights.view(-1)[0] = math.nan
    leaves = [tensor.requires_grad_() for tensor in (value, xy, weights)]
    output = reference.msda_forward(value, level_hw, xy, weights)
    grad_output = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(3))
    written_out = reference.msda_backward(grad_output, value.detach(), level_hw, xy.detach(), weights.detach())
    if not output.requires_grad:  # nothing to sum: autograd has no graph
        assert not any(gradient.any() for gradient in written_out)
        return
    expected = torch.autograd.grad(output, leaves, grad_output)
    for result, wanted in zip(written_out, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)


def test_its_gradient_by_the_weights_does_not_depend_on_them(plain: Any) -> None:
    value, level_hw, xy, weights = plain.inputs()
    weights.requires_grad_()
    (first,) = torch.autograd.grad(reference.msda_forward(value, level_hw, xy, weights).sum(), weights)
    shifted = weights.detach() + 1
    shifted.requires_grad_()
    (second,) = torch.autograd.grad(reference.msda_forward(value, level_hw, xy, shifted).sum(), shifted)
    torch.testing.assert_close(first, second)  # the op is linear in the weights


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_sums_are_kept_in_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert reference.accumulate_dtype(dtype) == expected
