from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ddetr_cli.model.dropout import Dropout


def _quick(dropout: nn.Dropout, x: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16):
        return dropout(x)


def test_a_share_of_the_numbers_is_dropped_and_the_others_keep_their_sum() -> None:
    x = torch.ones(1000, 1000)
    found = _quick(Dropout(0.1), x)
    # 0.1 is 6554 of 65536; four standard deviations of a million draws.
    assert (found == 0).double().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / 1e6) ** 0.5)
    assert found.unique().tolist() == [0.0, pytest.approx(65536 / (65536 - 6554))]


def test_rows_and_columns_are_dropped_alike_and_neighbours_do_not_know_of_each_other() -> None:
    dropped = (_quick(Dropout(0.5), torch.ones(512, 512)) == 0).double()
    for axis in (0, 1):
        # Means of 512 draws have a standard deviation of 0.022; of 1024 of them none is six away.
        assert ((dropped.mean(axis) - 0.5).abs() < 6 * 0.5 / 512**0.5).all()
    for shift in (1, 2, 4):
        together = (dropped[:, shift:] * dropped[:, :-shift]).mean().item()
        assert together == pytest.approx(0.25, abs=5 * (3 / 16 / 512**2) ** 0.5)


def test_what_is_dropped_follows_from_torchs_seed() -> None:
    x = torch.ones(5, 7, 3)
    first = _quick(Dropout(0.3), x)
    assert torch.equal(_quick(Dropout(0.3), x), first)
    assert not torch.equal(_quick(Dropout(0.3), x, seed=2), first)


def test_the_gradient_is_that_of_what_was_kept() -> None:
    x = torch.randn(40, 3, dtype=torch.bfloat16, requires_grad=True)
    found = _quick(Dropout(0.5), x)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert torch.equal(x.grad, torch.where(found == 0, 0.0, 2.0).bfloat16())


def test_without_autocast_it_is_torchs_number_for_number() -> None:
    x = torch.ones(50, 50)
    found = []
    for dropout in (Dropout(0.1), nn.Dropout(0.1)):
        torch.manual_seed(1)
        found.append(dropout(x))
    assert torch.equal(*found)


@pytest.mark.parametrize("dropout", [Dropout(0.5).eval(), Dropout(0.0)])
def test_nothing_is_dropped_in_evaluation_or_at_probability_0(dropout: Dropout) -> None:
    x = torch.randn(30)
    assert torch.equal(_quick(dropout, x), x)
