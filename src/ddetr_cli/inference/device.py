"""Which device to compute on: what the user wrote, checked, and what this machine really has.

Importing this module does not import torch, so that a mistyped device is refused at once.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ddetr_cli.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def check_device_name(text: str) -> str:
    """``text`` if it is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises UsageError otherwise."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise UsageError(f"device {text!r}: unknown. Choose auto, cpu, cuda or cuda:N.")
    return text


def resolve_device(text: str, *, on_notice: Callable[[str], None] | None = None) -> torch.device:
    """The torch device that ``text`` means here; a CUDA device has computed something before it is returned.

    ``auto`` is the first CUDA device, or the CPU where there is none; a CUDA device that is there but does not work
    is reported to ``on_notice``. Raises UsageError for an unknown name and DeviceError for a device that is absent
    or does not work.
    """
    import torch

    check_device_name(text)
    if text == "cpu":
        return torch.device("cpu")
    try:
        return _cuda_device(int(text.partition(":")[2] or 0))
    except DeviceError as error:
        if text != "auto":
            raise
        # A machine without any NVIDIA device is the ordinary case and worth no line.
        if torch.cuda.is_available() and on_notice is not None:
            on_notice(f"{error} Going on with the CPU.")
        return torch.device("cpu")


def _cuda_device(index: int) -> torch.device:
    import torch

    name = f"device cuda:{index}"
    if not torch.cuda.is_available():
        why = (
            "this PyTorch was built without CUDA"
            if torch.version.cuda is None
            else f"no NVIDIA GPU, or its driver is too old for CUDA {torch.version.cuda}"
        )
        raise DeviceError(f"{name}: not available ({why}). Use --device cpu.")
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(
            f"{name}: not available (this machine has {count}: cuda:0 to cuda:{count - 1}). Choose one."
        )
    device = torch.device("cuda", index)
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(index)
        why = str(error).strip().splitlines()[0]
        if "no kernel image" in why:
            built = " ".join(torch.cuda.get_arch_list())
            why = f"no kernel image for sm_{major}{minor} in this PyTorch, which has {built}"
        raise DeviceError(
            f"{name}: does not work ({why}). Install a matching PyTorch, or use --device cpu."
        ) from error
    return device
