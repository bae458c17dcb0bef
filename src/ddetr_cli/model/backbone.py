"""The convolutional trunk: ResNet with torchvision's tensor names, and a small one for CPUs.

# B batch, C channels, H, W height and width of a map
ResNet-50 is the v1.5 layout (the stride sits on the 3x3 convolution) with frozen batch-norm, as the authors use it;
``resnet-tiny`` has basic blocks and trainable batch-norm, because a frozen one cannot be trained from scratch.
Written here rather than taken from torchvision: importing that costs a folder run more than two seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm2d(nn.Module):
    """Batch-norm whose statistics and affine terms are constants (buffers, not parameters); eps 1e-5."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B,C,H,W) with the stored statistics."""
        scale, shift = self.scale_and_shift()
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What it multiplies by and then adds, each (C,)."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return scale, self.bias - self.running_mean * scale


def _normed(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``; under autocast, where 16 bits decide the digits, constants are taken into the convolution.

    That spares two passes over its output, and two more backward.
    """
    device = x.device.type
    is_16_bit = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not isinstance(norm, FrozenBatchNorm2d) or not is_16_bit:
        return norm(conv(x))  # type: ignore[no-any-return]
    scale, shift = norm.scale_and_shift()
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation)


def _conv3x3(channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=dilation, dilation=dilation, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3 (carries the stride), 1x1 with four times the width, and a shortcut."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        channels_out = width * self.expansion
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, stride, dilation)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = norm(channels_out)
        self.downsample = _shortcut(channels_in, channels_out, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B,channels_in,H,W) -> (B,4*width,H/stride,W/stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(_normed(self.conv1, self.bn1, x))
        x = F.relu(_normed(self.conv2, self.bn2, x))
        return F.relu(_normed(self.conv3, self.bn3, x) + shortcut)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels_in, width, stride, dilation)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = norm(width)
        self.downsample = _shortcut(channels_in, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B,channels_in,H,W) -> (B,width,H/stride,W/stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(_normed(self.conv1, self.bn1, x))
        return F.relu(_normed(self.conv2, self.bn2, x) + shortcut)


class _Shortcut(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return _normed(cast(nn.Conv2d, self[0]), self[1], x)


def _shortcut(channels_in: int, channels_out: int, stride: int, norm: Norm) -> nn.Sequential | None:
    if stride == 1 and channels_in == channels_out:
        return None
    return _Shortcut(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), norm(channels_out))


@dataclass(frozen=True)
class BackboneSpec:
    """What distinguishes one trunk from another."""

    block: type[Bottleneck | BasicBlock]
    stem_channels: int
    stem_kernel: int
    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    norm: Norm
    frozen_stages: tuple[str, ...]  # parameters under these names do not train

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of the maps at strides 8, 16 and 32."""
        _, c3, c4, c5 = (width * self.block.expansion for width in self.widths)
        return c3, c4, c5


BACKBONES: dict[str, BackboneSpec] = {
    "resnet50": BackboneSpec(
        Bottleneck, 64, 7, (64, 128, 256, 512), (3, 4, 6, 3), FrozenBatchNorm2d, ("conv1", "layer1")
    ),
    "resnet-tiny": BackboneSpec(BasicBlock, 32, 3, (32, 64, 160, 320), (2, 2, 2, 2), nn.BatchNorm2d, ()),
}


class ResNet(nn.Module):
    """A trunk of ``BACKBONES``; with ``dilation`` the last stage keeps stride 16 and dilates instead (DC5)."""

    def __init__(self, spec: BackboneSpec, *, dilation: bool = False) -> None:
        super().__init__()
        self.channels = spec.channels
        self.conv1 = nn.Conv2d(3, spec.stem_channels, spec.stem_kernel, 2, spec.stem_kernel // 2, bias=False)
        self.bn1 = spec.norm(spec.stem_channels)
        channels = spec.stem_channels
        for number, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True), start=1):
            dilated = dilation and number == 4
            blocks: list[nn.Module] = []
            for i in range(depth):
                stride = 2 if i == 0 and number > 1 and not dilated else 1
                # The first block of a dilated stage is not dilated: torchvision's replace_stride_with_dilation.
                blocks.append(spec.block(channels, width, stride, 2 if dilated and i > 0 else 1, spec.norm))
                channels = width * spec.block.expansion
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(spec.frozen_stages) if spec.frozen_stages else True)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps of strides 8, 16 and 32 (16 when dilated) of pixels (B,3,H,W)."""
        x = F.relu(_normed(self.conv1, self.bn1, pixels))
        x = F.max_pool2d(x, 3, 2, 1)
        x = self.get_submodule("layer1")(x)
        maps = []
        for name in ("layer2", "layer3", "layer4"):
            x = self.get_submodule(name)(x)
            maps.append(x)
        return maps
