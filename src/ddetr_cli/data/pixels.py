"""Pictures to the model's input: the network size, normalised pixels, the padding of a batch.

# B batch, H and W network size in pixels, h and w of one image
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# ImageNet statistics, RGB, for values in [0,1]. Source: the authors' transforms.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def network_size(
    width: int,
    height: int,
    short: int,
    *,
    cap: int | None = None,
    rule: Literal["original", "hf"] = "original",
) -> tuple[int, int]:
    """(h, w) the model sees of a ``width`` x ``height`` image: short side ``short``, long side about <= ``cap``.

    ``cap`` defaults to ``short`` * 1333 / 800, truncated. ``original`` is the authors' rule, whose long side can
    exceed the cap by a pixel or two because it follows from the rounded short side; ``hf`` is that of
    transformers, which takes the unrounded one. Both give at least 1 px; where that would leave the long side
    unbounded (an aspect ratio beyond twice the cap) it is the cap.
    """
    if min(width, height, short) < 1:
        raise ValueError(f"an image of {width}x{height} px at short side {short} has no size")
    cap = short * 1333 // 800 if cap is None else cap
    small, large = min(width, height), max(width, height)
    exact = float(short)
    target = short
    if large / small * short > cap:
        exact = cap * small / large
        target = round(exact)
    if target < 1:
        sides = (1, cap)
    elif small == target:
        sides = (small, large)
    else:
        sides = (target, max(1, int((target if rule == "original" else exact) * large / small)))
    return sides if height <= width else (sides[1], sides[0])


def to_pixels(image: Image.Image, size_hw: tuple[int, int]) -> Tensor:
    """Normalised float32 (3,h,w) of an RGB picture, resized by Pillow's antialiased bilinear filter."""
    h, w = size_hw
    channels_last = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
    pixels = np.empty((3, h, w), np.float32)
    # In numpy, which keeps to the calling thread: in torch every thread that reads pictures would start threads of
    # its own. The order of these three roundings is the authors'; folding them into one changes last bits.
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        np.divide(channels_last[..., channel], np.float32(255), out=pixels[channel])
        pixels[channel] -= np.float32(mean)
        pixels[channel] /= np.float32(std)
    return torch.from_numpy(pixels)


def pad_batch(images: Sequence[Tensor], *, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Pixels (B,3,H,W) of images (3,h,w), zero at the bottom and right, and is_padding (B,H,W), True there.

    H and W are the largest h and w, rounded up to a multiple of ``multiple``.
    """
    if not images:
        raise ValueError("a batch needs at least one image")
    height, width = (-(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2))
    pixels = images[0].new_zeros((len(images), 3, height, width))
    is_padding = torch.ones((len(images), height, width), dtype=torch.bool, device=pixels.device)
    for index, image in enumerate(images):
        h, w = image.shape[1:]
        pixels[index, :, :h, :w] = image
        is_padding[index, :h, :w] = False
    return pixels, is_padding
