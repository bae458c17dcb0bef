from __future__ import annotations

import pytest
import torch
from torch import nn

from ddetr_cli.model.backbone import BACKBONES, FrozenBatchNorm2d, ResNet


def _with_random_statistics(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for name, tensor in module.state_dict().items():
        if tensor.dim() == 1:
            low = 0.5 if name.endswith(("running_var", "weight")) else -0.3
            tensor.uniform_(low, low + 0.6, generator=generator)
    return module.eval()


@pytest.mark.parametrize("dilation", [False, True])
def test_resnet50_equals_torchvision_with_the_same_tensors(dilation: bool):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet50(
        weights=None,
        norm_layer=torchvision.ops.misc.FrozenBatchNorm2d,
        replace_stride_with_dilation=[False, False, dilation],
    )
    _with_random_statistics(theirs)
    ours = ResNet(BACKBONES["resnet50"], dilation=dilation).eval()
    result = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == ["fc.weight", "fc.bias"]

    pixels = torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        maps = ours(pixels)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(pixels))))
        x = theirs.layer1(x)
        for ours_map, name in zip(maps, ("layer2", "layer3", "layer4"), strict=True):
            x = getattr(theirs, name)(x)
            # float32 sums of up to 4608 products in another order
            torch.testing.assert_close(ours_map, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def test_dilation_keeps_the_stride_of_the_last_stage_at_16():
    pixels = torch.zeros(1, 3, 64, 96)
    with torch.device("meta"):
        plain, dilated = ResNet(BACKBONES["resnet50"]), ResNet(BACKBONES["resnet50"], dilation=True)
    shapes = [[tuple(m.shape[-2:]) for m in trunk(pixels.to("meta"))] for trunk in (plain, dilated)]
    assert shapes == [[(8, 12), (4, 6), (2, 3)], [(8, 12), (4, 6), (4, 6)]]


def test_the_stem_and_first_stage_of_resnet50_do_not_train():
    with torch.device("meta"):
        trunk = ResNet(BACKBONES["resnet50"])
    frozen = {name.split(".")[0] for name, p in trunk.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[0] for name, p in trunk.named_parameters() if p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert trained == {"layer2", "layer3", "layer4"}
    # 222,400 of SPEC's totals are frozen
    assert sum(p.numel() for p in trunk.parameters() if not p.requires_grad) == 222_400


def test_frozen_norms_are_constants_and_the_small_trunk_trains_its_own():
    with torch.device("meta"):
        frozen, small = ResNet(BACKBONES["resnet50"]), ResNet(BACKBONES["resnet-tiny"])
    assert any(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert all(p.requires_grad for p in small.parameters())
    assert any(isinstance(m, nn.BatchNorm2d) for m in small.modules())


def test_a_frozen_norm_divides_by_the_root_of_variance_plus_eps():
    norm = FrozenBatchNorm2d(1)
    norm.load_state_dict(
        {"weight": torch.tensor([3.0]), "bias": torch.tensor([0.5]), "running_mean": torch.tensor([2.0]),
         "running_var": torch.tensor([4.0])}
    )  # fmt: skip
    x = torch.full((1, 1, 1, 1), 6.0)
    assert float(norm(x)) == pytest.approx(3.0 * 4.0 / (4.0 + 1e-5) ** 0.5 + 0.5, rel=1e-6)


def test_constants_of_frozen_batch_norm_move_into_the_convolutions_under_autocast_only():
    trunk = _with_random_statistics(ResNet(BACKBONES["resnet50"]))
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    calls: list[torch.dtype] = []
    norm = trunk.get_submodule("layer4.0.bn1")
    norm.register_forward_hook(lambda _, __, output: calls.append(output.dtype))
    exact = trunk(pixels)
    assert calls == [torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        maps = trunk(pixels)
    assert calls == [torch.float32]
    for ours, wanted in zip(maps, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        # Fifty layers of 8-bit mantissas.
        assert (ours.float() - wanted).norm() < 0.03 * wanted.norm()
    gradients = []
    for enabled in (False, True):
        trunk.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = sum(m.float().square().mean() for m in trunk(pixels))
        loss.backward()
        gradients.append(trunk.get_submodule("layer4.0.conv1").weight.grad.clone())
    assert (gradients[1] - gradients[0]).norm() < 0.15 * gradients[0].norm()  # there and back
