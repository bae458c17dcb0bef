"""The native kernels of CUDA: which there are, and how they are called.

``csrc/include/ddetr_cuda.h`` is the boundary; ``PROTOTYPES`` repeats it, and a test compares the two. As in
``native`` callers have checked their arguments and every buffer is torch's: calls can be captured into a CUDA graph.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import native, reference
from ddetr_cli.versions import CUDA_KERNELS, find_built_file

_POINTER, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_STRIDES = ctypes.POINTER(_I64)
_PLACE = [_I32, _I32, _POINTER]  # kernels, device, stream

PROTOTYPES: native.Prototypes = {
    "ddetr_abi_version": native.PROTOTYPES["ddetr_abi_version"],
    "ddetr_error_string": native.PROTOTYPES["ddetr_error_string"],
    "ddetr_cuda_error_string": (ctypes.c_char_p, [_I32]),
    "ddetr_msda_forward_cuda": (_I32, [*native.PROBLEM, _POINTER, _STRIDES, *[_POINTER] * 3, *_PLACE]),
    "ddetr_msda_fused_cuda": (
        _I32,
        [*native.PROBLEM, *[_POINTER, _STRIDES] * 2, _POINTER, _I32, _POINTER, *_PLACE],
    ),
    "ddetr_msda_backward_cuda": (_I32, [*native.PROBLEM, *[_POINTER] * 7, *_PLACE]),
    "ddetr_msda_fused_backward_cuda": (
        _I32,
        [*native.PROBLEM, *[_POINTER] * 3, _STRIDES, _POINTER, _I32, *[_POINTER] * 2, *_PLACE],
    ),
    "ddetr_msda_backward_sorted_bytes": (_I64, native.PROBLEM),
    "ddetr_msda_backward_sorted_cuda": (_I32, [*native.PROBLEM, *[_POINTER] * 8, _I64, *_PLACE]),
}

# DDETR_CUDA_* of the header. "fast" decides by the number of queries between the two that follow it.
KERNELS = {"plain": 0, "fast": 1, "fast rows": 2, "fast warps": 3}


@dataclass(frozen=True)
class CudaKernels:
    """The CUDA library; as ``CpuKernels``, with the work queued on torch's current stream of the tensors' device.

    ``kernels`` is one of ``KERNELS``; what the fast ones are not made for, the plain ones compute.
    """

    path: Path
    library: ctypes.CDLL
    kernels: str = "plain"

    def forward(self, value: Tensor, level_hw: Sequence[int], sampling_xy: Tensor, weights: Tensor) -> Tensor:
        value = native.with_channels_side_by_side(value)
        sampling_xy, weights = sampling_xy.contiguous(), weights.contiguous()
        output = native.empty_output(value, sampling_xy.shape[1])
        self._check(
            self.library.ddetr_msda_forward_cuda(
                *native.problem(value, level_hw, sampling_xy.shape[1], sampling_xy.shape[4]),
                value.data_ptr(),
                native.int64_array(value.stride()[:3]),
                *(tensor.data_ptr() for tensor in (sampling_xy, weights, output)),
                *self._place(value),
            )
        )
        return output

    def fused(
        self, value: Tensor, level_hw: Sequence[int], reference_points: Tensor, projected: Tensor, out: Tensor
    ) -> None:
        _, queries, levels, numbers = reference_points.shape
        value, reference_points = native.with_channels_side_by_side(value), reference_points.contiguous()
        if projected.stride(2) != 1:
            projected = projected.contiguous()
        per_point = 3 * value.shape[2] * levels
        self._check(
            self.library.ddetr_msda_fused_cuda(
                *native.problem(value, level_hw, queries, projected.shape[2] // per_point if per_point > 0 else 0),
                value.data_ptr(),
                native.int64_array(value.stride()[:3]),
                projected.data_ptr(),
                native.int64_array(projected.stride()[:2]),
                reference_points.data_ptr(),
                numbers,
                out.data_ptr(),
                *self._place(value),
            )
        )

    def backward(
        self,
        grad_output: Tensor,
        value: Tensor,
        level_hw: Sequence[int],
        sampling_xy: Tensor,
        weights: Tensor,
        *,
        deterministic: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients; the same bits at every call if ``deterministic``, None: as PyTorch is set."""
        inputs = [t.contiguous() for t in (grad_output, value, sampling_xy, weights)]
        problem = native.problem(value, level_hw, sampling_xy.shape[1], sampling_xy.shape[4])
        by_place = [torch.empty_like(tensor) for tensor in inputs[2:]]
        if torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic:
            grad_value = torch.empty_like(inputs[1])
            size = self.library.ddetr_msda_backward_sorted_bytes(*problem)
            self._check(min(size, 0))
            workspace = torch.empty(size, dtype=torch.uint8, device=value.device)
            self._check(
                self.library.ddetr_msda_backward_sorted_cuda(
                    *problem,
                    *(tensor.data_ptr() for tensor in (*inputs, grad_value, *by_place, workspace)),
                    size,
                    *self._place(value),
                )
            )
            return grad_value, by_place[0], by_place[1]
        # the kernel adds, in the dtype of the sums
        sums = torch.zeros_like(inputs[1], dtype=sampling_xy.dtype)
        self._check(
            self.library.ddetr_msda_backward_cuda(
                *problem, *(tensor.data_ptr() for tensor in (*inputs, sums, *by_place)), *self._place(value)
            )
        )
        return sums.to(value.dtype), by_place[0], by_place[1]

    def fused_backward(
        self,
        grad_output: Tensor,
        value: Tensor,
        level_hw: Sequence[int],
        reference_points: Tensor,
        projected: Tensor,
        *,
        deterministic: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of value and projections; ``deterministic`` as in ``backward``."""
        if torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic:
            by_parts = partial(self.backward, deterministic=True)
            return reference.fused_backward(by_parts, grad_output, value, level_hw, reference_points, projected)
        _, queries, levels, numbers = reference_points.shape
        grad_output, value, reference_points = (t.contiguous() for t in (grad_output, value, reference_points))
        if projected.stride(2) != 1:
            projected = projected.contiguous()
        per_point = 3 * value.shape[2] * levels
        sums = torch.zeros_like(value, dtype=projected.dtype)
        grad_projected = torch.empty_like(projected, memory_format=torch.contiguous_format)
        self._check(
            self.library.ddetr_msda_fused_backward_cuda(
                *native.problem(value, level_hw, queries, projected.shape[2] // per_point if per_point > 0 else 0),
                *(tensor.data_ptr() for tensor in (grad_output, value, projected)),
                native.int64_array(projected.stride()[:2]),
                reference_points.data_ptr(),
                numbers,
                *(tensor.data_ptr() for tensor in (sums, grad_projected)),
                *self._place(value),
            )
        )
        return sums.to(value.dtype), grad_projected

    def _place(self, tensor: Tensor) -> tuple[int, int, int]:
        return KERNELS[self.kernels], *device_and_stream(tensor)

    def _check(self, status: int) -> None:
        if status != 0:
            text = self.library.ddetr_cuda_error_string if status > 0 else self.library.ddetr_error_string
            raise KernelError(
                f"{self.path}: failed with code {status} ({text(status).decode()}). Use --device cpu, or reinstall "
                "ddetr on this machine."
            )


def device_and_stream(tensor: Tensor) -> tuple[int, int]:
    """Index of the device that holds ``tensor``, and torch's current stream there."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def cuda_kernels() -> CudaKernels | None:
    """The plain CUDA kernels, or None where none are installed; untested, that is ``selftest``'s business."""
    with native.LOCK:
        return _load()


def wanted_kernels(installed: CudaKernels) -> CudaKernels:
    """Those of ``installed`` that ``DDETR_CUDA_KERNELS`` names. Raises KernelError for a name it does not have."""
    wanted = os.environ.get("DDETR_CUDA_KERNELS") or CUDA_KERNELS
    if wanted not in ("plain", "fast"):
        raise KernelError(f"DDETR_CUDA_KERNELS={wanted}: unknown. Use plain or fast, or leave it unset.")
    return replace(installed, kernels=wanted)


@cache
def _load() -> CudaKernels | None:
    path = find_built_file("libddetr_cuda.so")
    return None if path is None else CudaKernels(path, native.load(path, PROTOTYPES))
