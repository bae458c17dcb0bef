from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddetr_cli.model import attention
from ddetr_cli.model.attention import DeformableAttention
from ddetr_cli.ops import prefers_fused

LEVEL_HW = [6, 4, 3, 5]


def _run(numbers: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and every gradient of one layer with padding, in float64."""
    torch.manual_seed(0)
    layer = DeformableAttention(32, heads=4, levels=2, points=3).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, memory = torch.randn(2, 7, 32).double().requires_grad_(), torch.randn(2, 39, 32).double().requires_grad_()
    reference = (torch.rand(2, 7, 2, numbers).double() * 0.6 + 0.2).requires_grad_(numbers == 2)
    is_padding = torch.zeros(2, 39, dtype=torch.bool)
    is_padding[1, 20:24] = True
    output = layer(query, reference, memory, LEVEL_HW, is_padding)
    (output * torch.randn_like(output)).sum().backward()
    named = {"query": query, "memory": memory, "reference": reference, **dict(layer.named_parameters())}
    return output, {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}


@pytest.mark.parametrize("numbers", [2, 4], ids=["centres", "boxes"])
def test_by_the_fused_form_a_layer_gives_and_learns_the_same(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, gradients = _run(numbers)
    asked: list[torch.device] = []
    monkeypatch.setattr(attention, "prefers_fused", lambda device: asked.append(device) or True)
    monkeypatch.delattr(attention, "msda")
    found, by_fused = _run(numbers)
    assert asked
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert by_fused.keys() == gradients.keys() and len(gradients) == (11 if numbers == 2 else 10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(by_fused[name], gradient, rtol=1e-9, atol=1e-9)


def test_a_cpu_goes_by_way_of_locations_and_weights() -> None:
    # Its backward pass does so in any case, and forward for training needs them kept.
    assert not prefers_fused(torch.device("cpu"))
