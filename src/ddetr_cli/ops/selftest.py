"""Whether a native library computes right on a device: a case of a few milliseconds against the reference.

A library built for another architecture, or meeting a driver that is too old, may load and then fail, or compute
nothing at all. So no result of it is used before this has passed once per device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import reference
from ddetr_cli.ops.native import CpuKernels
from ddetr_cli.ops.native_cuda import CudaKernels

LEVEL_HW = [5, 7, 2, 3]
# Sums of 8 products of order 1, rounded to the storage type at the end.
_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_RESULTS = ("output", "gradient of the value", "gradient of the locations", "gradient of the weights")
_FUSED_RESULT = "output of the fused form"
_FUSED_GRADIENTS = ("gradient of the value of the fused form", "gradient of the projections")
_FAST_FORMS = ("fast rows", "fast warps")


@dataclass(frozen=True)
class _Size:
    """What decides which kernel computes; as many queries as positions, 41, are taken in an order of their own."""

    queries: int
    channels: int


# Sizes of the plain kernels, and of the fast ones, which take 32 channels and not 9.
_ODD, _EVEN = _Size(11, 9), _Size(41, 32)


def check_kernels(kernels: CpuKernels | CudaKernels, device: torch.device) -> None:
    """Return if all kernels agree with the reference in all four dtypes. Raises KernelError if not."""
    sizes = (_ODD,) if isinstance(kernels, CpuKernels) else (_ODD, _EVEN)
    for dtype, tolerance in _TOLERANCES.items():
        for size in sizes:
            _check(kernels, device, dtype, size, tolerance)


def check_fast_kernels(kernels: CudaKernels, device: torch.device) -> None:
    """Return if the fast kernels agree with the reference in every form. Raises KernelError if not."""
    for form in _FAST_FORMS:
        for dtype, tolerance in _TOLERANCES.items():
            _check(replace(kernels, kernels=form), device, dtype, _EVEN, tolerance)


def _check(
    kernels: CpuKernels | CudaKernels, device: torch.device, dtype: torch.dtype, size: _Size, tolerance: float
) -> None:
    real = reference.accumulate_dtype(dtype)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=real)

    Q, D = size.queries, size.channels
    value, grad_output = normal(2, 41, 2, D).to(dtype), normal(2, Q, 2 * D).to(dtype)
    # from -0.2 to 1.2: inside, on the border, outside
    sampling_xy = torch.rand(2, Q, 2, 2, 4, 2, generator=generator, dtype=real) * 1.4 - 0.2
    sampling_xy[0, 0, 0, 0, 0, 0] = torch.nan
    weights = torch.rand(2, Q, 2, 2, 4, generator=generator, dtype=real)
    centres = torch.rand(2, Q, 2, 2, generator=generator, dtype=real)
    projected = normal(2, Q, 48)
    gradients = reference.msda_backward(grad_output, value, LEVEL_HW, sampling_xy, weights)
    fused_gradients = reference.fused_backward(
        reference.msda_backward, grad_output, value, LEVEL_HW, centres, projected
    )
    expected = {
        _RESULTS: (reference.msda_forward(value, LEVEL_HW, sampling_xy, weights), *gradients),
        (_FUSED_RESULT,): (reference.msda_fused(value, LEVEL_HW, centres, projected),),
    }
    value, sampling_xy, weights, grad_output, centres, projected = (
        tensor.to(device) for tensor in (value, sampling_xy, weights, grad_output, centres, projected)
    )
    inputs = (value, LEVEL_HW, sampling_xy, weights)
    fused = torch.empty_like(grad_output)
    kernels.fused(value, LEVEL_HW, centres, projected, fused)
    computed = [(kernels.forward(*inputs), *kernels.backward(grad_output, *inputs)), (fused,)]
    pairs = list(zip(expected.items(), computed, strict=True))
    if isinstance(kernels, CudaKernels):
        in_order = kernels.backward(grad_output, *inputs, deterministic=True)
        names = tuple(f"{name}, deterministic," for name in _RESULTS[1:])
        pairs.append(((names, gradients), in_order))
        found = kernels.fused_backward(grad_output, value, LEVEL_HW, centres, projected, deterministic=False)
        pairs.append(((_FUSED_GRADIENTS, fused_gradients), found))
    for (names, wanted), results in pairs:
        for name, one, other in zip(names, wanted, results, strict=True):
            error = ((other.cpu() - one).abs().max() / one.abs().max().clamp_min(1)).item()
            if not error <= tolerance:  # so that NaN fails
                raise KernelError(
                    f"{kernels.path}: computes a wrong {name} in {dtype} on {device} (relative error {error:.2g}). "
                    "Use --device cpu, or reinstall ddetr on this machine."
                )
