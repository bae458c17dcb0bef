"""Copies between the host and a device for which neither waits."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` of the host on ``device``, which copies it in its turn while the host goes on.

    A copy from ordinary memory keeps the host until the device has done all it was given before.
    """
    return tensor.to(device) if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """``tensor`` on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._arrival: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(tensor.device))

    @property
    def is_there(self) -> bool:
        """Whether ``wait`` returns at once."""
        return self._arrival is None or self._arrival.query()

    def wait(self) -> Tensor:
        """The tensor on the CPU, once it is there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copy
