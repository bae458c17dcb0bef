"""Sine position encoding that ignores padding. Source: arXiv:2005.12872 and the authors' position_encoding.py.

# B batch, C channels, H, W height and width of a map
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000.0


def sine_position(
    is_padding: Tensor, channels: int, *, shift: float = 0.5, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Encoding (B,C,H,W) of each pixel's place among the valid ones of ``is_padding`` (B,H,W, True = padding).

    The first half of the channels encodes y, the second x; sines on even and cosines on odd channels. A pixel
    counts from its centre; with ``shift`` 0, DETR's way, from its far side. Always computed in float32 or wider:
    wholly padded columns give arguments near -3e6, which 16-bit floats cannot hold.
    """
    valid = ~is_padding
    axes = []
    for dim in (1, 2):
        count = valid.cumsum(dim, dtype=dtype)
        last = count.narrow(dim, count.shape[dim] - 1, 1)
        axes.append(encode_coordinate((count - shift) / (last + 1e-6), channels // 2))
    return torch.cat(axes, dim=3).permute(0, 3, 1, 2)


def encode_coordinate(coordinate: Tensor, channels: int) -> Tensor:
    """Interleaved sines and cosines (..., channels) of coordinates (...) in [0,1], scaled to [0, 2 pi]."""
    # The periods are float32 whatever the coordinate is, as in the authors' code.
    index = torch.arange(channels, dtype=torch.float32, device=coordinate.device)
    period = TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / channels)
    angle = coordinate.unsqueeze(-1) * (2 * math.pi) / period
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)
