"""What a measurement ran on: processor, threads, device, versions. A figure without them says nothing."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ddetr_cli
from ddetr_cli.bench.allocator import allocator_settings
from ddetr_cli.inference.threads import available_cores

# What may be compared with, and what others' models and exports need.
_PEERS = ("transformers", "timm", "onnx", "onnxscript", "onnxruntime", "openvino")


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
        "allocator": allocator_settings(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of everything that decides the speed; ``commit`` only in a clone of the repository."""
    versions = {
        "ddetr": ddetr_cli.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    commit = source_commit(Path(ddetr_cli.__file__).parents[2])
    return versions if commit is None else versions | {"commit": commit}


def peer_versions() -> dict[str, str | None]:
    """Versions of the programs that can be compared with, None where they are not installed."""
    found: dict[str, str | None] = {}
    for name in _PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def source_commit(root: Path) -> str | None:
    """The commit checked out at ``root``, with a + where files differ from it; None where it is no clone."""
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "src", "csrc"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int:
    """Memory this process holds now; its peak so far where the system does not say."""
    try:
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
