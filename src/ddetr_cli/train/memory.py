"""How much memory a run may still take, and training with less of it: activations computed twice instead of kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddetr_cli.model import detr
from ddetr_cli.model.backbone import Bottleneck
from ddetr_cli.model.transformer import DecoderLayer, EncoderLayer

# What is computed twice: the layers of both families, and the blocks of the large trunk.
_LAYERS = (EncoderLayer, DecoderLayer, detr.EncoderLayer, detr.DecoderLayer, Bottleneck)


def checkpoint_activations(model: nn.Module) -> None:
    """From now on have ``model``, in training, keep only what enters its layers, and compute the rest again backward.

    Gradients stay the same, dropout included. A block whose batch-norm gathers statistics keeps all: it would count
    every batch twice.
    """
    for module in model.modules():
        gathers = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
        if isinstance(module, _LAYERS) and not gathers:
            # On the instance: the names of its tensors stay as they are.
            module.forward = partial(_twice, module, module.forward)  # type: ignore[method-assign]


def _twice(module: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    groups: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
) -> int | None:
    """Memory this process can still take: of the machine, or less where its container's limit says so.

    None where the system does not tell.
    """
    found = list(_left_to_groups(groups, membership))
    with suppress(OSError, ValueError, StopIteration):
        lines = meminfo.read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    if not found:
        with suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(found)) if found else None


def _left_to_groups(groups: Path, membership: Path) -> Iterator[int]:
    """What every limit on the control groups this process is in (cgroup v2) leaves."""
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers:
            continue
        # Within a container the path is often that of the host, and the container's own group is the root.
        group = groups / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # "max" where there is no limit
                limit = int((folder / "memory.max").read_text())
                yield limit - int((folder / "memory.current").read_text())
            if folder == groups:
                break
