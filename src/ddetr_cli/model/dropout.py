"""Dropout, as quick on a CPU as the layers around it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

_STEPS = 1 << 16  # of the probability: sixteen random bits decide about one number


class Dropout(nn.Dropout):
    """``nn.Dropout``; under autocast on a CPU from quicker random numbers, a quarter of a whole training step.

    Those follow from one number of torch's generator, so that what is seeded repeats. The probability is then the
    nearest multiple of 2^-16, and what is kept is scaled to match it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (...) with a random share of its numbers zero and the others scaled up, in training mode."""
        dropped = round(self.p * _STEPS)
        is_ours = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and dropped < _STEPS
        if not (self.training and dropped and is_ours):
            return super().forward(x)
        seed = int(torch.randint(2**63 - 1, ()))
        # 64 bits at a time, of which numpy draws one in a nanosecond: four numbers' worth.
        bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16)[: x.numel()]
        is_kept = torch.from_numpy(bits) >= dropped - _STEPS // 2
        return x * is_kept.view(x.shape).to(x.dtype).mul_(_STEPS / (_STEPS - dropped))
