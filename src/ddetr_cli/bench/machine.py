"""What a measurement ran on: processor, threads, device, versions. A figure without them says nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import ddetr_cli


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, load and the device measured on, as plain JSON types."""
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def describe_versions() -> dict[str, str]:
    """Versions of everything that decides the speed."""
    versions = {
        "ddetr": ddetr_cli.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name for itself; where the system keeps it elsewhere, its architecture."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores this process may use, which taskset and containers can make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
