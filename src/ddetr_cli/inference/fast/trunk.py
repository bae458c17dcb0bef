"""The convolutional trunk and the input projections on the dense kernels: batch-norms folded, maps channels-last.

# C channels; maps are (height, width, C), one image at a time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddetr_cli.inference.fast.workspace import Place, Plan
from ddetr_cli.model.backbone import BasicBlock, Bottleneck, FrozenBatchNorm2d, ResNet
from ddetr_cli.ops.dense import DenseEngine, Packed

PIXEL_CHANNELS = 4  # red, green, blue and a zero: a window's line is then evenly spaced


@dataclass(frozen=True)
class Convolution:
    """A packed convolution and its geometry; where there is a shortcut, it is summed with a 1x1 convolution of it."""

    packed: Packed
    taps: int  # of a side of its window
    stride: int
    padding: int
    dilation: int
    shortcut_stride: int  # 0: there is none

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of its output."""

        lost = self.dilation * (self.taps - 1) - 2 * self.padding
        return (height - lost - 1) // self.stride + 1, (width - lost - 1) // self.stride + 1

    def add_to(
        self,
        plan: Plan,
        source: Place,
        to: Place,
        *,
        relu: bool = False,
        added: Place | None = None,
        shortcut: Place | None = None,
    ) -> None:
        """Let ``plan`` compute ``to`` = act(convolution of ``source``, and of ``shortcut``, + ``added``)."""
        plan.add(
            lambda: plan.engine.convolution(
                plan.crew,
                self.packed,
                plan.map(source),
                plan.map(to),
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                relu=relu,
                added=None if added is None else plan.map(added),
                is_float=to.dtype == torch.float32,
                second=None if shortcut is None else plan.map(shortcut),
                second_stride=self.shortcut_stride,
            )
        )


def fold(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution with the batch-norm that follows it, as in evaluation mode."""
    weight, bias = conv.weight.detach().double(), None if conv.bias is None else conv.bias.detach().double()
    if norm is None:
        return weight.float(), None if bias is None else bias.float()
    assert isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d))
    epsilon = norm.eps if isinstance(norm, nn.BatchNorm2d) else 1e-5
    mean, variance = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
    scale = norm.weight.detach().double() * (variance + epsilon).rsqrt()
    shift = norm.bias.detach().double() - mean * scale
    if bias is not None:
        shift = shift + bias * scale
    return (weight * scale[:, None, None, None]).float(), shift.float()


def pack(
    engine: DenseEngine, conv: nn.Conv2d, norm: nn.Module | None = None, shortcut: nn.Sequential | None = None
) -> Convolution:
    """A convolution, and a shortcut's to sum it with, with the batch-norms that follow, in the engine's layout."""
    assert conv.groups == 1
    weight, bias = fold(conv, norm)
    if shortcut is None:
        return _geometry(conv, engine.pack(weight, bias))
    other, other_norm = shortcut
    assert isinstance(other, nn.Conv2d)
    assert (other.kernel_size, other.padding, other.groups) == ((1, 1), (0, 0), 1)
    other_weight, other_bias = fold(other, other_norm)
    assert bias is not None
    assert other_bias is not None
    return _geometry(conv, engine.pack(weight, bias + other_bias, other_weight.flatten(1)), other.stride[0])


def _geometry(conv: nn.Conv2d, packed: Packed, shortcut_stride: int = 0) -> Convolution:
    assert isinstance(conv.padding[0], int)
    return Convolution(
        packed, conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.dilation[0], shortcut_stride
    )


def pack_stem(engine: DenseEngine, conv: nn.Conv2d, norm: nn.Module) -> Convolution:
    """The first convolution, over pixels: a line of its window is one tap, as deep as it has numbers."""
    weight, bias = fold(conv, norm)
    columns, _, height, width = weight.shape
    taps = torch.zeros(columns, height, 1, width, PIXEL_CHANNELS)
    taps[..., :3] = weight.permute(0, 2, 3, 1)[:, :, None]
    return _geometry(conv, engine.pack_taps(taps.flatten(3), bias))


class Block:
    """A residual block: convolutions in a row, the last summed with the shortcut's or added to its map.

    Summing saves the shortcut's map. With a stride it keeps the lines of the last convolution apart, whose ends fill
    no tile: that costs more where it is a 3x3 one, or where the lines are short (``is_narrow``).
    """

    def __init__(self, engine: DenseEngine, block: Bottleneck | BasicBlock, *, is_narrow: bool) -> None:
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if isinstance(block, Bottleneck):
            pairs.append((block.conv3, block.bn3))
        shortcut = block.downsample
        pays = isinstance(block, Bottleneck) and not is_narrow
        is_summed = shortcut is not None and (pays or shortcut[0].stride == (1, 1))
        self.convs = [pack(engine, *pair) for pair in pairs[:-1]]
        self.convs.append(pack(engine, *pairs[-1], shortcut if is_summed else None))
        self.shortcut = None if shortcut is None or is_summed else pack(engine, *shortcut)

    def add_to(self, plan: Plan, x: Place, border: int) -> Place:
        """Let ``plan`` compute the block of ``x``: into a place with a border, or over ``x`` if it only adds."""
        shortcut, last = x, self.convs[-1]
        other = "odd" if x.name == "even" else "even"
        if self.shortcut is not None:
            shortcut = plan.place(other, *self.shortcut.size(*x.shape[:2]), last.packed.columns, border=border)
            self.shortcut.add_to(plan, x, shortcut)
        for i, conv in enumerate(self.convs[:-1]):
            h, w = conv.size(*x.shape[:2])
            to = plan.place(f"inner {i}", h, w, conv.packed.columns, border=self.convs[i + 1].padding)
            conv.add_to(plan, x, to, relu=True)
            x = to
        if not last.shortcut_stride:
            last.add_to(plan, x, shortcut, relu=True, added=shortcut)
            return shortcut
        to = plan.place(other, *last.size(*x.shape[:2]), last.packed.columns, border=border)
        last.add_to(plan, x, to, relu=True, shortcut=shortcut)
        return to


class Projection:
    """An input projection: convolution and group norm, to rows of the transformer's memory."""

    def __init__(self, engine: DenseEngine, projection: nn.Module) -> None:
        assert isinstance(projection, nn.Sequential)
        conv, norm = projection[0], projection[1]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.GroupNorm)
        self.conv = pack(engine, conv)
        self.groups, self.epsilon = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight.detach().float().clone(), norm.bias.detach().float().clone()

    def add_to(self, plan: Plan, source: Place, memory: Place, first_row: int) -> tuple[int, int]:
        """Let ``plan`` project ``source`` to rows of ``memory`` from ``first_row`` on; returns height and width."""
        h, w = self.conv.size(*source.shape[:2])
        channels = self.conv.packed.columns
        raw = plan.place("inner 0", h, w, channels, dtype=torch.float32)
        partials = plan.place("inner 1", -(-h * w // 64), channels, 2, dtype=torch.float32)
        self.conv.add_to(plan, source, raw)
        plan.add(
            lambda: plan.engine.group_norm(
                plan.crew,
                plan.tensor(raw).view(h * w, channels),
                self.groups,
                self.weight,
                self.bias,
                self.epsilon,
                plan.tensor(partials),
                plan.tensor(memory)[first_row : first_row + h * w],
            )
        )
        return h, w


def _pooled(height: int, width: int) -> tuple[int, int]:
    """Height and width after the 3x3 maximum of stride 2."""
    return (height - 1) // 2 + 1, (width - 1) // 2 + 1


class Trunk:
    """A ResNet and the projections of its maps, packed."""

    def __init__(self, engine: DenseEngine, backbone: ResNet, projections: Sequence[nn.Module]) -> None:
        self.stem = pack_stem(engine, backbone.conv1, backbone.bn1)
        self.stages = []
        for number in range(1, 5):
            stage = backbone.get_submodule(f"layer{number}")
            assert isinstance(stage, nn.Sequential)
            self.stages.append([Block(engine, block, is_narrow=number == 4) for block in stage])  # type: ignore[arg-type]
        self.projections = [Projection(engine, projection) for projection in projections]

    def _levels_of(self, stage: int) -> list[int]:
        """The levels that are projected from the output of a stage, 0 to 3."""
        if len(self.projections) == 1:
            return [0] if stage == 3 else []
        levels = [stage - 1] if stage > 0 else []
        return [*levels, *range(3, len(self.projections))] if stage == 3 else levels

    def level_sizes(self, height: int, width: int) -> list[int]:
        """[h0, w0, h1, w1, ...] of the levels for an image of this size."""
        h, w = _pooled(*self.stem.size(height, width))
        sizes: list[int] = []
        for number, stage in enumerate(self.stages):
            for block in stage:
                for conv in block.convs:
                    h, w = conv.size(h, w)
            for level in self._levels_of(number):
                sizes += self.projections[level].conv.size(h, w)
        return sizes

    def add_to(self, plan: Plan, height: int, width: int, memory: Place) -> Place:
        """Let ``plan`` compute ``memory`` (S,C) from the pixel map that is returned, which is to be filled first."""
        # One pixel more than the window needs: its lines are read in whole steps of the engine.
        plan.part = "backbone"
        pixels = plan.place("inner 0", height, width, PIXEL_CHANNELS, border=self.stem.padding + 1)
        h, w = self.stem.size(height, width)
        stem = plan.place("even", h, w, self.stem.packed.columns, border=1)
        self.stem.add_to(plan, pixels, stem, relu=True)
        h, w = _pooled(h, w)
        x = plan.place("odd", h, w, stem.shape[2], border=self.stages[0][0].convs[0].padding)
        pooled = x
        plan.add(lambda: plan.engine.max_pool(plan.crew, plan.map(stem), plan.map(pooled)))
        row = 0
        for number, stage in enumerate(self.stages):
            following = self.stages[number + 1][:1] if number < 3 else []
            readers = [block.convs[0] for block in (*stage[1:], *following)]
            levels = self._levels_of(number)
            readers += [self.projections[level].conv for level in levels]
            border = max((conv.padding for conv in readers), default=0)
            plan.part = "backbone"
            for block in stage:
                x = block.add_to(plan, x, border)
            plan.part = "input projections"
            for level in levels:
                h, w = self.projections[level].add_to(plan, x, memory, row)
                row += h * w
        return pixels
