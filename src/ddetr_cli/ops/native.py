"""The native kernels: finding, checking and calling them. THE ONLY FILE WITH POINTERS.

``csrc/include/ddetr.h`` is the boundary; ``PROTOTYPES`` repeats it, and a test compares the two. Callers have
checked shapes, dtypes and devices (``msda`` does); every buffer is allocated here, by torch.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr_cli.errors import KernelError
from ddetr_cli.versions import find_built_file

ABI_VERSION = 1

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_ISAS = {"best": 0, "portable": 1, "avx2": 2, "avx512": 3}

_POINTER, _I32, _I64, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p


class Dims(ctypes.Structure):
    """``ddetr_msda_dims``."""

    _fields_ = [(name, _I64) for name in ("batch", "positions", "heads", "channels", "queries", "levels", "points")]


_PROBLEM: list[Any] = [ctypes.POINTER(Dims), _I32, ctypes.POINTER(_I64)]

# function: (result, arguments)
PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "ddetr_abi_version": (_I32, []),
    "ddetr_error_string": (_TEXT, [_I32]),
    "ddetr_cpu_isa": (_I32, [_I32]),
    "ddetr_msda_forward_cpu": (_I32, [*_PROBLEM, *[_POINTER] * 4, _I64, _I64, _I32, _POINTER]),
    "ddetr_msda_backward_cpu": (_I32, [*_PROBLEM, *[_POINTER] * 7, _I64, _I64, _I32, _POINTER]),
    "ddetr_cuda_error_string": (_TEXT, [_I32]),
    "ddetr_msda_forward_cuda": (_I32, [*_PROBLEM, *[_POINTER] * 4, _I32, _POINTER]),
    "ddetr_msda_backward_cuda": (_I32, [*_PROBLEM, *[_POINTER] * 7, _I32, _POINTER]),
}
_COMMON = ("ddetr_abi_version", "ddetr_error_string")
_CPU = ("ddetr_cpu_isa", "ddetr_msda_forward_cpu", "ddetr_msda_backward_cpu")
_CUDA = ("ddetr_cuda_error_string", "ddetr_msda_forward_cuda", "ddetr_msda_backward_cuda")


@dataclass(frozen=True)
class CpuKernels:
    """The CPU library. Its methods have the arguments and results of the functions of ``reference``."""

    path: Path
    isa: str
    library: ctypes.CDLL
    parallel_for: int | None  # address of libtorch's, so that the kernels run in torch's own thread pool

    def forward(self, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
        call = _Call(value, level_hw, sampling_xy, weights)
        output = call.empty_output()
        self._check(
            self.library.ddetr_msda_forward_cpu(
                *call.problem,
                *call.inputs,
                output.data_ptr(),
                0,
                call.dims.batch * call.dims.heads * call.dims.queries,
                _ISAS[self.isa],
                self.parallel_for,
            )
        )
        return output

    def backward(
        self, grad_output: Tensor, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = _Call(value, level_hw, sampling_xy, weights)
        grad_output = grad_output.contiguous()
        gradients = call.empty_gradients()
        self._check(
            self.library.ddetr_msda_backward_cpu(
                *call.problem,
                grad_output.data_ptr(),
                *call.inputs,
                *map(Tensor.data_ptr, gradients),
                0,
                call.dims.batch * call.dims.heads,
                _ISAS[self.isa],
                self.parallel_for,
            )
        )
        return gradients[0].to(value.dtype), gradients[1], gradients[2]

    def _check(self, status: int) -> None:
        if status != 0:
            reason = self.library.ddetr_error_string(status).decode()
            raise KernelError(f"{self.path}: failed with code {status} ({reason}). Report this as a bug.")


@dataclass(frozen=True)
class CudaKernels:
    """The CUDA library; as ``CpuKernels``, with the work queued on torch's current stream of the tensors' device."""

    path: Path
    library: ctypes.CDLL

    def forward(self, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
        call = _Call(value, level_hw, sampling_xy, weights)
        output = call.empty_output()
        self._check(
            self.library.ddetr_msda_forward_cuda(
                *call.problem, *call.inputs, output.data_ptr(), *_device_and_stream(value)
            )
        )
        return output

    def backward(
        self, grad_output: Tensor, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = _Call(value, level_hw, sampling_xy, weights)
        grad_output = grad_output.contiguous()
        gradients = call.empty_gradients()
        gradients[0].zero_()  # the kernel adds to it
        self._check(
            self.library.ddetr_msda_backward_cuda(
                *call.problem,
                grad_output.data_ptr(),
                *call.inputs,
                *map(Tensor.data_ptr, gradients),
                *_device_and_stream(value),
            )
        )
        return gradients[0].to(value.dtype), gradients[1], gradients[2]

    def _check(self, status: int) -> None:
        if status != 0:
            text = self.library.ddetr_cuda_error_string if status > 0 else self.library.ddetr_error_string
            raise KernelError(
                f"{self.path}: failed with code {status} ({text(status).decode()}). Use --device cpu, or reinstall "
                "ddetr on this machine."
            )


class _Call:
    """The arguments that every kernel takes, and the memory they point to, kept alive as long as this lives."""

    def __init__(self, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> None:
        batch, positions, heads, channels = value.shape
        _, queries, _, levels, points, _ = sampling_xy.shape
        assert len(level_hw) == 2 * levels
        self.dims = Dims(batch, positions, heads, channels, queries, levels, points)
        self.tensors = [tensor.contiguous() for tensor in (value, sampling_xy, weights)]
        self.problem = (self.dims, _DTYPES[value.dtype], (_I64 * len(level_hw))(*level_hw))
        self.inputs = [tensor.data_ptr() for tensor in self.tensors]

    def empty_output(self) -> Tensor:
        d = self.dims
        return self.tensors[0].new_empty(d.batch, d.queries, d.heads * d.channels)

    def empty_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """For value in the dtype of the sums (16 bits would lose them), for locations and for weights."""
        value, sampling_xy, weights = self.tensors
        return (
            torch.empty_like(value, dtype=sampling_xy.dtype),
            torch.empty_like(sampling_xy),
            torch.empty_like(weights),
        )


def _device_and_stream(tensor: Tensor) -> tuple[int, int]:
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


_LOCK = threading.Lock()


def cpu_kernels() -> CpuKernels | None:
    """The CPU kernels, or None where none are installed. Raises KernelError for a library that does not work."""
    with _LOCK:
        return _load_cpu()


def cuda_kernels() -> CudaKernels | None:
    """The CUDA kernels, or None where none are installed; untested, that is ``selftest``'s business."""
    with _LOCK:
        return _load_cuda()


@cache
def _load_cpu() -> CpuKernels | None:
    path = find_built_file("libddetr_cpu.so")
    if path is None:
        return None
    library = _load(path, (*_COMMON, *_CPU))
    wanted = os.environ.get("DDETR_CPU_ISA", "best")
    if wanted not in _ISAS:
        raise KernelError(f"DDETR_CPU_ISA={wanted}: not an instruction set. Use one of {', '.join(_ISAS)}.")
    isa = library.ddetr_cpu_isa(_ISAS[wanted])
    if isa < 0:
        raise KernelError(f"DDETR_CPU_ISA={wanted}: not on this processor or not in this build. Leave it unset.")
    names = {number: name for name, number in _ISAS.items()}
    return CpuKernels(path, names[isa], library, _torch_parallel_for())


@cache
def _load_cuda() -> CudaKernels | None:
    path = find_built_file("libddetr_cuda.so")
    return None if path is None else CudaKernels(path, _load(path, (*_COMMON, *_CUDA)))


def _load(path: Path, functions: Sequence[str]) -> ctypes.CDLL:
    advice = "Reinstall ddetr (pip install --force-reinstall --no-deps ...)."
    try:
        library = ctypes.CDLL(str(path))
        for name in functions:
            function = getattr(library, name)
            function.restype, function.argtypes = PROTOTYPES[name]
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path}: cannot be loaded ({error}). {advice}") from error
    version = library.ddetr_abi_version()
    if version != ABI_VERSION:
        raise KernelError(
            f"{path}: was built for another version of ddetr (ABI {version}, this one needs {ABI_VERSION}). {advice}"
        )
    return library


def _torch_parallel_for() -> int | None:
    """Address of libtorch's ``torch_parallel_for`` (a C function since 2.10); None means one thread."""
    beside_torch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for candidate in (str(beside_torch), None):
        try:
            function = ctypes.CDLL(candidate).torch_parallel_for
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
