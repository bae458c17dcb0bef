"""What is installed: versions, and the native kernels as recorded when they were built. Imports no torch.

What really runs, and has passed its self-test, is ``ops.kernel_status``'s business.
"""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import ddetr_cli

_DEPENDENCIES = ("torch", "torchvision", "numpy", "pillow", "pycocotools", "safetensors", "huggingface_hub")
_RECORD = "kernels.json"

# The CUDA kernels that run where DDETR_CUDA_KERNELS does not say otherwise, and the GPUs on which each kind passed
# ``pytest tests/ops --require-cuda``. Fast ones become the default once they have.
CUDA_KERNELS = "plain"
CUDA_PROVED_ON: dict[str, tuple[str, ...]] = {"plain": (), "fast": ()}


def version_text() -> str:
    """Lines for ``ddetr --version``: ours, what we run on, and ``kernels_line``."""
    installed = ", ".join(f"{name} {_version(name)}" for name in _DEPENDENCIES)
    return f"ddetr {ddetr_cli.__version__}\npython {platform.python_version()}, {installed}\n{kernels_line()}"


def kernels_line() -> str:
    """``kernels: cpu native|reference, cuda ARCHITECTURES (which)|none (reason)``, from the record of the build."""
    if find_built_file("libddetr_cpu.so") is None:
        return "kernels: cpu reference, cuda none (no compiler worked when ddetr was installed)"
    record_path = find_built_file(_RECORD)
    if record_path is None:
        return "kernels: cpu native, cuda none (no record of the build)"
    try:
        cuda = json.loads(record_path.read_text(encoding="utf-8"))["cuda"]
        architectures, reason = str(cuda["architectures"]), str(cuda["reason"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"kernels: cpu native, cuda none (unreadable record {record_path}: {error})"
    if find_built_file("libddetr_cuda.so") is None:
        return f"kernels: cpu native, cuda none ({reason or 'library missing'})"
    wanted = os.environ.get("DDETR_CUDA_KERNELS") or CUDA_KERNELS
    return f"kernels: cpu native, cuda {architectures} ({cuda_kernels_text(wanted)})"


def cuda_kernels_text(kernels: str) -> str:
    """``fast kernels, proved on NVIDIA H200``: a kind of CUDA kernels, and where its tests have passed."""
    proved = ", ".join(CUDA_PROVED_ON.get(kernels, ()))
    return f"{kernels} kernels, " + (f"proved on {proved}" if proved else "not yet proved on a GPU")


def find_built_file(name: str) -> Path | None:
    """A file that the native build left, or None.

    Looked for in ``$DDETR_NATIVE_DIR`` (a build folder, for development; then nowhere else), in the ``ops`` folder of
    this package, and where the installed distribution put it, which in an editable installation is another place.
    """
    chosen = os.environ.get("DDETR_NATIVE_DIR")
    if chosen:
        candidates = [Path(chosen) / name]
    else:
        candidates = [Path(__file__).parent / "ops" / name]
        if not candidates[0].exists():
            candidates = _distribution_files(name)
    return next((path for path in candidates if path.exists()), None)


def _distribution_files(name: str) -> list[Path]:
    try:
        files = metadata.files("ddetr-cli") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.name == name]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
