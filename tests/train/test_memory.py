from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddetr_cli.model.backbone import BACKBONES, FrozenBatchNorm2d, ResNet
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import DETR, get_preset
from ddetr_cli.train.memory import available_bytes, checkpoint_activations


def _pass(model: nn.Module, pixels: Tensor) -> tuple[int, dict[str, Tensor]]:
    """Bytes kept for the backward pass, and the gradients."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)  # dropout
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(pixels, None)
        total = sum(logits.square().sum() + boxes.sum() for logits, boxes in
                    [(output.logits, output.boxes_cxcywh), *output.aux])  # fmt: skip
    held = sum(size for where, size in kept.items() if where not in own)
    total.backward()
    return held, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["deformable-detr", DETR])
def test_activations_computed_twice_give_the_same_gradients_of_less_memory(family: str) -> None:
    levels = {"levels": 1} if family == DETR else {}
    config = get_preset("tiny", family=family, refine_boxes=False, two_stage=False, dropout=0.1, queries=9, **levels)
    torch.manual_seed(0)
    model = build_detector(config).train()
    pixels = torch.randn(2, 3, 64, 96)
    held, expected = _pass(model, pixels)
    statistics = model.state_dict()["backbone.bn1.running_mean"].clone()
    model.zero_grad()
    checkpoint_activations(model)
    less, found = _pass(model, pixels)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert less < 0.8 * held
    # From 0, a mean m is 0.1 m after the first batch; after the same once more, and not twice, 0.9 * 0.1 m + 0.1 m.
    torch.testing.assert_close(model.state_dict()["backbone.bn1.running_mean"], 1.9 * statistics)


def test_a_trunk_of_frozen_batch_norm_is_computed_twice_too() -> None:
    torch.manual_seed(0)
    trunk = ResNet(BACKBONES["resnet50"]).train()
    assert isinstance(trunk.bn1, FrozenBatchNorm2d)
    pixels = torch.randn(1, 3, 64, 64)
    sum(m.sum() for m in trunk(pixels)).backward()
    expected = {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}
    trunk.zero_grad()
    checkpoint_activations(trunk)
    calls: list[int] = []
    block = trunk.get_submodule("layer4.0.conv1")
    block.register_forward_hook(lambda *_: calls.append(1))
    sum(m.sum() for m in trunk(pixels)).backward()
    assert len(calls) == 2
    assert all(torch.equal(p.grad, expected[name]) for name, p in trunk.named_parameters() if p.grad is not None)


def test_nothing_is_computed_twice_where_nothing_is_learnt() -> None:
    model = build_detector(get_preset("tiny", queries=9)).eval()
    checkpoint_activations(model)
    calls: list[int] = []
    model.get_submodule("transformer.encoder.layers.0.norm1").register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64), None)
    assert len(calls) == 1


def test_memory_that_is_left_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    meminfo, membership, groups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "groups"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    2000 kB\n")
    membership.write_text("0::/job\n")
    (groups / "job").mkdir(parents=True)
    (groups / "job" / "memory.max").write_text("max\n")
    (groups / "job" / "memory.current").write_text("5\n")
    assert available_bytes(meminfo, groups, membership) == 2000 * 1024
    (groups / "job" / "memory.max").write_text("1000000\n")
    (groups / "job" / "memory.current").write_text("400000\n")
    assert available_bytes(meminfo, groups, membership) == 600_000
    (groups / "job" / "memory.current").write_text("1400000\n")
    assert available_bytes(meminfo, groups, membership) == 0
