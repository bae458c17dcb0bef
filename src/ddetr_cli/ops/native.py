"""The native kernels of the CPU, and what those of CUDA share: finding, checking and calling libraries.

``csrc/include/ddetr.h`` is the boundary; ``PROTOTYPES`` repeats it, and a test compares the two. Callers have
checked shapes, dtypes and devices (``msda`` does); every buffer is allocated here, by torch. Pointers are seen in the
``native*`` files alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import reference
from ddetr_cli.versions import find_built_file

ABI_VERSION = 4
FUSED_MAX_SAMPLES = 512
MAX_BANDS = 1024

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_ISAS = {"best": 0, "portable": 1, "avx2": 2, "avx512": 3}

_POINTER, _I32, _I64, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p


class Dims(ctypes.Structure):
    """``ddetr_msda_dims``."""

    _fields_ = [(name, _I64) for name in ("batch", "positions", "heads", "channels", "queries", "levels", "points")]


PROBLEM: list[Any] = [ctypes.POINTER(Dims), _I32, ctypes.POINTER(_I64)]

_STRIDES = ctypes.POINTER(_I64)
_SCRATCH: list[Any] = [_POINTER, _I64]

Prototypes = dict[str, tuple[Any, list[Any]]]  # function: (result, arguments)

PROTOTYPES: Prototypes = {
    "ddetr_abi_version": (_I32, []),
    "ddetr_error_string": (_TEXT, [_I32]),
    "ddetr_cpu_isa": (_I32, [_I32]),
    "ddetr_msda_forward_cpu": (
        _I32,
        [*PROBLEM, _POINTER, _STRIDES, *[_POINTER] * 3, *_SCRATCH, _I32, _POINTER],
    ),
    "ddetr_msda_fused_cpu": (
        _I32,
        [*PROBLEM, *[_POINTER, _STRIDES] * 2, _POINTER, _I32, _POINTER, *_SCRATCH, _I32, _POINTER],
    ),
    "ddetr_msda_backward_cpu": (
        _I32,
        [*PROBLEM, *[_POINTER] * 2, _STRIDES, *[_POINTER] * 5, *_SCRATCH, _I64, _I32, _POINTER],
    ),
}


@dataclass(frozen=True)
class CpuKernels:
    """The CPU library. Its methods have the arguments and results of the functions of ``reference``."""

    path: Path
    isa: str
    library: ctypes.CDLL
    parallel_for: int | None  # address of libtorch's, so that the kernels run in torch's own thread pool
    limit: str = "best"  # DDETR_CPU_ISA; the dense layers use AMX only under ``best``

    def forward(self, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
        _, queries, _, levels, points, _ = sampling_xy.shape
        value = with_channels_side_by_side(value)
        sampling_xy, weights = sampling_xy.contiguous(), weights.contiguous()
        output = empty_output(value, queries)
        scratch = _forward_scratch(value, queries * levels * points)
        self._check(
            self.library.ddetr_msda_forward_cpu(
                *problem(value, level_hw, queries, points),
                value.data_ptr(),
                int64_array(value.stride()[:3]),
                sampling_xy.data_ptr(),
                weights.data_ptr(),
                output.data_ptr(),
                scratch.data_ptr(),
                scratch.nbytes,
                _ISAS[self.isa],
                self.parallel_for,
            )
        )
        return output

    def fused(
        self, value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor, out: Tensor
    ) -> None:
        _, queries, levels, numbers = reference_points.shape
        heads = value.shape[2]
        samples = projected.shape[2] // (3 * heads) if heads > 0 else 0
        if samples > FUSED_MAX_SAMPLES:
            sampling_xy, weights = reference.locate_projected(level_hw, reference_points, projected, heads)
            out.copy_(self.forward(value, level_hw, sampling_xy, weights))
            return
        value, reference_points = with_channels_side_by_side(value), reference_points.contiguous()
        if projected.stride(2) != 1:
            projected = projected.contiguous()
        scratch = _forward_scratch(value, queries * samples)
        self._check(
            self.library.ddetr_msda_fused_cpu(
                *problem(value, level_hw, queries, samples // levels if levels > 0 else 0),
                value.data_ptr(),
                int64_array(value.stride()[:3]),
                projected.data_ptr(),
                int64_array(projected.stride()[:2]),
                reference_points.data_ptr(),
                numbers,
                out.data_ptr(),
                scratch.data_ptr(),
                scratch.nbytes,
                _ISAS[self.isa],
                self.parallel_for,
            )
        )

    def backward(
        self, grad_output: Tensor, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, queries, heads, levels, points, _ = sampling_xy.shape
        value = with_channels_side_by_side(value)
        grad_output, sampling_xy, weights = (t.contiguous() for t in (grad_output, sampling_xy, weights))
        gradients = [_empty(tensor, tensor.shape) for tensor in (value, sampling_xy, weights)]
        threads = torch.get_num_threads() if self.parallel_for else 1
        scratch = _backward_scratch(value, queries * levels * points, sampling_xy.element_size(), threads)
        self._check(
            self.library.ddetr_msda_backward_cpu(
                *problem(value, level_hw, queries, points),
                grad_output.data_ptr(),
                value.data_ptr(),
                int64_array(value.stride()[:3]),
                sampling_xy.data_ptr(),
                weights.data_ptr(),
                *map(Tensor.data_ptr, gradients),
                scratch.data_ptr(),
                scratch.nbytes,
                min(-(-threads // max(heads, 1)), MAX_BANDS),  # enough tasks for every thread
                _ISAS[self.isa],
                self.parallel_for,
            )
        )
        return gradients[0], gradients[1], gradients[2]

    def fused_backward(
        self, grad_output: Tensor, value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor
    ) -> tuple[Tensor, Tensor]:
        return reference.fused_backward(self.backward, grad_output, value, level_hw, reference_points, projected)

    def _check(self, status: int) -> None:
        if status != 0:
            reason = self.library.ddetr_error_string(status).decode()
            raise KernelError(f"{self.path}: failed with code {status} ({reason}). Report this as a bug.")


def problem(value: Tensor, level_hw: Sequence[int], queries: int, points: int) -> tuple[Dims, int, Any]:
    """The arguments that every kernel begins with."""
    batch, positions, heads, channels = value.shape
    dims = Dims(batch, positions, heads, channels, queries, len(level_hw) // 2, points)
    return dims, _DTYPES[value.dtype], int64_array(level_hw)


def int64_array(of: Sequence[int]) -> Any:
    """An array of 64-bit integers."""
    return (_I64 * len(of))(*of)


def with_channels_side_by_side(value: Tensor) -> Tensor:
    """``value`` where only its other dimensions have gaps, else a copy without."""
    return value if value.stride(3) == 1 or value.shape[3] <= 1 else value.contiguous()


# Packed heads are read from the second-level cache; more at a time than it holds come from further away.
_PACKED_BYTES = 3 << 20
# Packing reads and writes a value once; it pays where queries read every position at least this often.
_READS_THAT_PAY = 4


def _forward_scratch(value: Tensor, samples: int) -> Tensor:
    """Room to pack heads where that pays, else for the row of zeros."""
    _, positions, heads, channels = value.shape
    row = channels * value.element_size()
    head = (positions + 1) * row
    is_packed = value.stride(1) == channels
    pays = samples * 4 >= positions * _READS_THAT_PAY and not is_packed
    return _empty(value, (min(heads, max(1, _PACKED_BYTES // max(head, 1))) * head if pays else row,), torch.uint8)


def _backward_scratch(value: Tensor, samples: int, real_bytes: int, threads: int) -> Tensor:
    """Room to pack heads and their sums, one for each thread, where that pays, else for the row of zeros."""
    _, positions, heads, channels = value.shape
    row = channels * value.element_size()
    head = (positions + 1) * row + positions * channels * real_bytes
    can_be_read_in_place = value.is_contiguous() and value.element_size() == real_bytes
    pays = samples * 4 >= positions * _READS_THAT_PAY or not can_be_read_in_place
    return _empty(value, (min(heads, threads) * head + 64 if pays else row,), torch.uint8)


# Linux gives memory out in pages of 4 KiB at first touch, which takes as long as the kernel that writes them, unless
# it is asked for pages of 2 MiB.
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def empty_output(value: Tensor, queries: int) -> Tensor:
    """Memory for the (B,Q,M*D) that the op gives for ``value``."""
    return _empty(value, (value.shape[0], queries, value.shape[2] * value.shape[3]))


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory on the device of ``like``, in large pages where it is large."""
    tensor = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if tensor.nbytes >= 2 * _HUGE_PAGE and _MADVISE is not None and tensor.device.type == "cpu":
        begin = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        _MADVISE(begin, end - begin, _MADV_HUGEPAGE)  # advice: refused, nothing changes
    return tensor


def _find_madvise() -> Any:
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.restype, madvise.argtypes = ctypes.c_int, [_POINTER, ctypes.c_size_t, ctypes.c_int]
    return madvise if sys.platform == "linux" else None


_MADVISE = _find_madvise()


LOCK = threading.Lock()


def cpu_kernels() -> CpuKernels | None:
    """The CPU kernels, or None where none are installed. Raises KernelError for a library that does not work."""
    with LOCK:
        return _load_cpu()


@cache
def _load_cpu() -> CpuKernels | None:
    path = find_built_file("libddetr_cpu.so")
    if path is None:
        return None
    library = load(path, PROTOTYPES)
    wanted = os.environ.get("DDETR_CPU_ISA", "best")
    if wanted not in _ISAS:
        raise KernelError(f"DDETR_CPU_ISA={wanted}: not an instruction set. Use one of {', '.join(_ISAS)}.")
    isa = library.ddetr_cpu_isa(_ISAS[wanted])
    if isa < 0:
        raise KernelError(f"DDETR_CPU_ISA={wanted}: not on this processor or not in this build. Leave it unset.")
    names = {number: name for name, number in _ISAS.items()}
    return CpuKernels(path, names[isa], library, _torch_parallel_for(), wanted)


def load(path: Path, prototypes: Prototypes) -> ctypes.CDLL:
    """The library at ``path`` with its functions declared. Raises KernelError for one that is not ours."""
    advice = "Reinstall ddetr (pip install --force-reinstall --no-deps ...)."
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in prototypes.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
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
