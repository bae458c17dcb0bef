"""Who computes the op on a device: the native library where one is installed and right, else the reference."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import native, native_cuda, reference, selftest
from ddetr_cli.versions import cuda_kernels_text


class Kernels(Protocol):
    """Both directions of the op and its fused form, on tensors whose shapes, dtypes and devices fit together."""

    def forward(self, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor: ...

    def backward(
        self, grad_output: Tensor, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def fused(
        self, value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor, out: Tensor
    ) -> None:
        """Write ``msda_fused`` of the rest into ``out``."""

    def fused_backward(
        self, grad_output: Tensor, value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of value and projections."""


class ReferenceKernels:
    """The reference in the form of kernels."""

    forward = staticmethod(reference.msda_forward)
    backward = staticmethod(reference.msda_backward)

    @staticmethod
    def fused(
        value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor, out: Tensor
    ) -> None:
        out.copy_(reference.msda_fused(value, level_hw, reference_points, projected))

    fused_backward = staticmethod(partial(reference.fused_backward, reference.msda_backward))


@dataclass(frozen=True)
class KernelStatus:
    """What really runs on this machine, in words: for ``ddetr bench`` and ``detect -v``."""

    cpu: str
    cuda: str

    def __str__(self) -> str:
        return f"kernels: cpu {self.cpu}; cuda {self.cuda}"


_LOCK = threading.Lock()
_BY_DEVICE: dict[torch.device, Kernels | KernelError] = {}


def kernels_for(device: torch.device) -> Kernels:
    """The kernels for tensors on ``device``, chosen and tested at its first use.

    Raises KernelError for a library that is there but broken, at every call, and for one that is missing where
    ``DDETR_REQUIRE_NATIVE=1``. A missing library is otherwise replaced by the reference, with one warning.
    """
    chosen = _BY_DEVICE.get(device)
    if chosen is None:
        with _LOCK:
            chosen = _BY_DEVICE.get(device)
            if chosen is None:
                chosen = _BY_DEVICE[device] = _choose(device)
    if isinstance(chosen, KernelError):
        raise KernelError(*chosen.args)
    return chosen


def prefers_fused(device: torch.device) -> bool:
    """Whether the fused form is the quicker one on ``device`` when gradients are wanted, too: by the fast kernels."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    chosen = kernels_for(device)
    return isinstance(chosen, native_cuda.CudaKernels) and chosen.kernels != "plain"


def kernel_status() -> KernelStatus:
    """What computes the op here, on the CPU and on every CUDA device; runs the self-tests where they have not run."""
    return KernelStatus(cpu=_status(torch.device("cpu")), cuda=_cuda_status())


def _choose(device: torch.device) -> Kernels | KernelError:
    try:
        kernels = native.cpu_kernels() if device.type == "cpu" else native_cuda.cuda_kernels()
        if kernels is not None:
            # Nothing of the caller's state may leak into the test: autocast would change its dtypes.
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                selftest.check_kernels(kernels, device)
                return _wanted(kernels, device) if isinstance(kernels, native_cuda.CudaKernels) else kernels
    except KernelError as error:
        return error
    if is_native_required():
        return KernelError(
            f"native {device.type} kernels: not installed, but DDETR_REQUIRE_NATIVE is set. Reinstall ddetr with a "
            "working compiler, or unset it."
        )
    warnings.warn(
        f"ddetr: no native {device.type} kernels installed; the PyTorch reference gives the same results, slower.",
        RuntimeWarning,
        stacklevel=2,
    )
    return ReferenceKernels()


def _wanted(installed: native_cuda.CudaKernels, device: torch.device) -> native_cuda.CudaKernels:
    """The CUDA kernels that are asked for, if they are right; else, with a warning, the plain ones, which are."""
    wanted = native_cuda.wanted_kernels(installed)
    if wanted.kernels == installed.kernels:
        return installed
    try:
        selftest.check_fast_kernels(wanted, device)
    except KernelError as error:
        warnings.warn(f"ddetr: the plain CUDA kernels run instead of the fast ones: {error}", RuntimeWarning, 2)
        return installed
    return wanted


def is_native_required() -> bool:
    """Whether ``DDETR_REQUIRE_NATIVE`` asks for an error instead of the reference."""
    return os.environ.get("DDETR_REQUIRE_NATIVE", "0").lower() not in ("", "0", "false", "off", "no")


def _cuda_status() -> str:
    if not torch.cuda.is_available():
        return "none (PyTorch sees no CUDA device)"
    devices = range(torch.cuda.device_count())
    return ", ".join(
        f"{torch.cuda.get_device_name(index)}: {_status(torch.device('cuda', index))}" for index in devices
    )


def _status(device: torch.device) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernels = kernels_for(device)
    except KernelError as error:
        return f"broken ({error})"
    if isinstance(kernels, native.CpuKernels):
        threads = f"{torch.get_num_threads()} threads" if kernels.parallel_for else "1 thread, no torch_parallel_for"
        return f"native ({kernels.isa}, {threads}, self-test passed)"
    if isinstance(kernels, native_cuda.CudaKernels):
        return f"native ({cuda_kernels_text(kernels.kernels)}, self-test passed)"
    return "reference (no native library installed)"
