"""Whether a native library computes right on a device: a case of a few milliseconds against the reference.

A library built for another architecture, or meeting a driver that is too old, may load and then fail, or compute
nothing at all. So no result of it is used before this has passed once per device.
"""

from __future__ import annotations

import torch

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import reference
from ddetr_cli.ops.native import CpuKernels, CudaKernels

LEVEL_HW = [5, 7, 2, 3]
# Sums of 8 products of order 1, rounded to the storage type at the end.
_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_RESULTS = (
    "output",
    "gradient of the value",
    "gradient of the locations",
    "gradient of the weights",
    "output of the fused form",
)


def check_kernels(kernels: CpuKernels | CudaKernels, device: torch.device) -> None:
    """Return if all three kernels agree with the reference in all four dtypes. Raises KernelError if not."""
    for dtype, tolerance in _TOLERANCES.items():
        real = reference.accumulate_dtype(dtype)
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(2, 41, 2, 9, generator=generator, dtype=real).to(dtype)
        # from -0.2 to 1.2: inside, on the border, outside
        sampling_xy = torch.rand(2, 11, 2, 2, 4, 2, generator=generator, dtype=real) * 1.4 - 0.2
        sampling_xy[0, 0, 0, 0, 0, 0] = torch.nan
        weights = torch.rand(2, 11, 2, 2, 4, generator=generator, dtype=real)
        grad_output = torch.randn(2, 11, 18, generator=generator, dtype=real).to(dtype)
        centres = torch.rand(2, 11, 2, 2, generator=generator, dtype=real)
        projected = torch.randn(2, 11, 48, generator=generator, dtype=real)
        expected = (
            reference.msda_forward(value, LEVEL_HW, sampling_xy, weights),
            *reference.msda_backward(grad_output, value, LEVEL_HW, sampling_xy, weights),
            reference.msda_fused(value, LEVEL_HW, centres, projected),
        )
        value, sampling_xy, weights, grad_output, centres, projected = (
            tensor.to(device) for tensor in (value, sampling_xy, weights, grad_output, centres, projected)
        )
        fused = torch.empty_like(grad_output)
        kernels.fused(value, LEVEL_HW, centres, projected, fused)
        computed = (
            kernels.forward(value, LEVEL_HW, sampling_xy, weights),
            *kernels.backward(grad_output, value, LEVEL_HW, sampling_xy, weights),
            fused,
        )
        for name, result, wanted in zip(_RESULTS, computed, expected, strict=True):
            error = ((result.cpu() - wanted).abs().max() / wanted.abs().max().clamp_min(1)).item()
            if not error <= tolerance:  # so that NaN fails
                raise KernelError(
                    f"{kernels.path}: computes a wrong {name} in {dtype} on {device} (relative error {error:.2g}). "
                    "Use --device cpu, or reinstall ddetr on this machine."
                )
