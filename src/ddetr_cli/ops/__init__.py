"""The one op of ours, multi-scale deformable attention, and who computes it on this machine."""

from __future__ import annotations

from ddetr_cli.ops.fused import msda_fused
from ddetr_cli.ops.kernels import KernelStatus, kernel_status, prefers_fused
from ddetr_cli.ops.msda import msda

__all__ = ["KernelStatus", "kernel_status", "msda", "msda_fused", "prefers_fused"]
