"""The native dense layers of CPU inference: engines, packed weights, buffers, and calls prepared once.

``csrc/include/ddetr_dense.h`` is the boundary, ``dense_abi`` its image in ctypes. A prepared call keeps its tensors
alive, but a ``Map`` is an address: whoever prepares calls on maps keeps their memory.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import native
from ddetr_cli.ops.dense_abi import (
    I64,
    POINTER,
    PROTOTYPES,
    AttentionInputs,
    Crew,
    EngineForm,
    FeedForward,
    GroupNorm,
    Product,
)

ENGINES = ("fp32 AVX2", "fp32 AVX-512", "bf16 AVX-512", "bf16 AMX", "fp32 AMX")
_DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 3}


# ---- memory ----


def huge_buffer(size: int) -> Tensor:
    """``size`` zero bytes, on huge pages where the system has them: small ones cost a fault and a lookup each."""
    # Private: memory to be shared with other processes gets no huge pages.
    try:
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size >> 20} MiB: no memory left ({error.strerror})") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _find_malloc_trim() -> Any:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # what Windows says of None
        return None
    trim.restype, trim.argtypes = ctypes.c_int, [ctypes.c_size_t]
    return trim


_MALLOC_TRIM = _find_malloc_trim()


def return_free_memory() -> None:
    """Give the system what glibc keeps of freed memory; other C libraries keep little. Takes milliseconds."""
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


@dataclass(frozen=True)
class Map:
    """Where a feature map lies: its pixel (0,0) at ``address``, ``border`` pixels of room on every side."""

    address: int
    height: int
    width: int
    channels: int
    border: int = 0

    @property
    def line(self) -> int:
        """Elements from one line to the next."""
        return (self.width + 2 * self.border) * self.channels


# ---- weights ----


@dataclass(frozen=True)
class Packed:
    """A convolution or linear layer in an engine's layout; ``bias`` is float32, padded to whole panels."""

    weights: Tensor
    bias: Tensor
    taps_y: int
    taps_x: int
    depth: int
    columns: int
    second_depth: int  # of the other input whose products are added, 0 where there is none


def _in_three_parts(weights: Tensor) -> Tensor:
    """weights (panels,steps,...) as bfloat16 (panels,steps,3,...) whose sum over the parts they are."""
    parts, rest = [], weights.contiguous()
    for _ in range(3):
        part = (rest.view(torch.int32) & -0x10000).view(torch.float32)
        parts.append(part.to(torch.bfloat16))
        rest = rest - part
    return torch.stack(parts, dim=2)


class DenseEngine:
    """One engine of the native library: how it wants its weights, and its layers as prepared calls."""

    def __init__(self, library: ctypes.CDLL, number: int, parallel_for: int | None) -> None:
        for name, (result, arguments) in PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library, self._number, self._parallel_for = library, number, parallel_for
        self.form = EngineForm()
        library.ddetr_dense_engine_form(number, self.form)
        self.name = ENGINES[number]
        self.dtype = torch.float32 if self.form.element_bytes == 4 else torch.bfloat16

    def pack(self, weight: Tensor, bias: Tensor | None, second: Tensor | None = None) -> Packed:
        """The layer of weight (N,C) or (N,C,h,w), and of ``second`` (N,D), the weights of another input."""
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        return self.pack_taps(weight.permute(0, 2, 3, 1), bias, second)

    def pack_taps(self, weight: Tensor, bias: Tensor | None, second: Tensor | None = None) -> Packed:
        """The layer of weight (N,taps_y,taps_x,depth); depths are filled up with zeros to what the engine takes."""
        form = self.form
        columns, taps_y, taps_x = weight.shape[:3]
        panels = -(-columns // form.panel)
        padded = [
            F.pad(source.float(), (0, -source.shape[-1] % form.depth_step))
            for source in (weight, weight.new_zeros(columns, 0) if second is None else second)
        ]
        rows = torch.cat([source.flatten(1) for source in padded], dim=1)
        rows = F.pad(rows, (0, 0, 0, panels * form.panel - columns))
        packed = rows.view(panels, form.panel, -1, form.pair).permute(0, 2, 1, 3)
        if form.weight_bytes > form.element_bytes:
            packed = _in_three_parts(packed.unflatten(1, (-1, form.depth_step // form.pair)))
        elif self.dtype == torch.bfloat16:
            packed = packed.to(self.dtype)
        memory = huge_buffer(packed.numel() * packed.element_size()).view(packed.dtype)
        memory.view(packed.shape).copy_(packed)
        full_bias = torch.zeros(panels * form.panel)
        if bias is not None:
            full_bias[:columns] = bias.float()
        depth, second_depth = (source.shape[-1] for source in padded)
        return Packed(memory, full_bias, taps_y, taps_x, depth, columns, second_depth)

    def scratch_bytes(self, channels: int, hidden: int) -> int:
        """Bytes per thread for a transformer of these widths, a multiple of a cache line."""
        return -(-int(self._library.ddetr_dense_scratch_bytes(self._number, channels, hidden)) // 64) * 64

    def crew(self, threads: int, scratch: Tensor) -> Crew:
        """The threads that a prepared call runs on, with their scratch, ``threads`` equal parts of it."""
        parallel_for = self._parallel_for if threads > 1 else None
        return Crew(self._number, threads, parallel_for, scratch.data_ptr(), scratch.numel() // threads)

    # ---- prepared calls ----

    def convolution(
        self,
        crew: Crew,
        packed: Packed,
        source: Map,
        to: Map,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        relu: bool = False,
        added: Map | None = None,
        is_float: bool = False,
        second: Map | None = None,
        second_stride: int = 1,
    ) -> Callable[[], None]:
        """to = act(convolution of source + 1x1 convolution of second + added); the source has a border.

        ``added`` may be ``to``.
        """
        assert (second is None) == (packed.second_depth == 0)
        size, line, pixel = self.form.element_bytes, source.line, source.channels
        return self._call(
            self._library.ddetr_dense_product,
            Product(
                lines=to.height,
                width=to.width,
                taps_y=packed.taps_y,
                taps_x=packed.taps_x,
                depth=packed.depth,
                input_line=stride * line,
                input_pixel=stride * pixel,
                tap_line=dilation * line,
                tap_pixel=dilation * pixel,
                columns=packed.columns,
                output_line=to.line,
                output_pixel=to.channels,
                added_line=0 if added is None else added.line,
                added_pixel=0 if added is None else added.channels,
                group=packed.weights.numel(),
                relu=relu,
                output_is_float=is_float,
                input=source.address - padding * (line + pixel) * size,
                packed=packed.weights.data_ptr(),
                bias=packed.bias.data_ptr(),
                added=None if added is None else added.address,
                output=to.address,
                second=None if second is None else second.address,
                second_line=0 if second is None else second_stride * second.line,
                second_pixel=0 if second is None else second_stride * second.channels,
                second_depth=packed.second_depth,
            ),
            crew,
            packed,
        )

    def linear(
        self,
        crew: Crew,
        packed: Packed,
        x: Tensor,
        to: Tensor,
        *,
        relu: bool = False,
        heads: int = 1,
    ) -> Callable[[], None]:
        """to (R,N) = x (R,C) through the layer, to float32 where ``to`` is; with ``heads``, to (heads,R,N/heads)."""
        rows, columns = x.shape[0], packed.columns
        return self._call(
            self._library.ddetr_dense_product,
            Product(
                lines=1,
                width=rows,
                taps_y=1,
                taps_x=1,
                depth=packed.depth,
                input_pixel=x.stride(0),
                columns=columns,
                output_pixel=columns // heads,
                group=columns // heads if heads > 1 else packed.weights.numel(),
                output_group=rows * columns // heads,
                relu=relu,
                output_is_float=to.dtype == torch.float32,
                input=x.data_ptr(),
                packed=packed.weights.data_ptr(),
                bias=packed.bias.data_ptr(),
                output=to.data_ptr(),
            ),
            crew,
            packed,
            x,
            to,
        )

    def attention_inputs(
        self,
        crew: Crew,
        value: Packed,
        projection: Packed,
        x: Tensor,
        positions: tuple[Tensor, Tensor],
        level_hw: Sequence[int],
        value_to: Tensor,
        projected_to: Tensor,
        *,
        heads: int,
    ) -> Callable[[], None]:
        """value_to (heads,S,C/heads) and projected_to (S,N) of x (S,C); positions of lines and of columns (.,C/2)."""
        rows, channels = x.shape
        sizes = (I64 * len(level_hw))(*level_hw)
        layer = AttentionInputs(
            levels=len(level_hw) // 2,
            level_hw=ctypes.cast(sizes, POINTER),
            channels=channels,
            value_group=channels // heads,
            value_output_group=rows * channels // heads,
            value_pixel=channels // heads,
            projected_columns=projection.columns,
            x=x.data_ptr(),
            line_positions=positions[0].data_ptr(),
            column_positions=positions[1].data_ptr(),
            packed_value=value.weights.data_ptr(),
            value_bias=value.bias.data_ptr(),
            packed_projection=projection.weights.data_ptr(),
            projection_bias=projection.bias.data_ptr(),
            value=value_to.data_ptr(),
            projected=projected_to.data_ptr(),
        )
        kept = (sizes, value, projection, x, positions, value_to, projected_to)
        return self._call(self._library.ddetr_dense_attention_inputs, layer, crew, *kept)

    def feed_forward(
        self,
        crew: Crew,
        output: Packed,
        linear1: Packed,
        linear2: Packed,
        norm1: tuple[Tensor, Tensor],
        norm2: tuple[Tensor, Tensor],
        epsilon: float,
        sampled: Tensor,
        x: Tensor,
        to: Tensor,
    ) -> Callable[[], None]:
        """The rest of a transformer layer after its attention has sampled; ``x`` and ``to`` may be float32."""
        return self._call(
            self._library.ddetr_dense_feed_forward,
            FeedForward(
                rows=x.shape[0],
                channels=x.shape[1],
                hidden=linear1.columns,
                epsilon=epsilon,
                is_float=x.dtype == torch.float32,
                sampled=sampled.data_ptr(),
                x=x.data_ptr(),
                output=to.data_ptr(),
                packed_output=output.weights.data_ptr(),
                packed_1=linear1.weights.data_ptr(),
                packed_2=linear2.weights.data_ptr(),
                output_bias=output.bias.data_ptr(),
                bias_1=linear1.bias.data_ptr(),
                bias_2=linear2.bias.data_ptr(),
                norm1_weight=norm1[0].data_ptr(),
                norm1_bias=norm1[1].data_ptr(),
                norm2_weight=norm2[0].data_ptr(),
                norm2_bias=norm2[1].data_ptr(),
            ),
            crew,
            *(output, linear1, linear2, norm1, norm2, sampled, x, to),
        )

    def group_norm(
        self,
        crew: Crew,
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        partials: Tensor,
        to: Tensor,
    ) -> Callable[[], None]:
        """to (R,C), the engine's elements, of x (R,C) float32; partials: ceil(R / 64) * C * 2 floats."""
        layer = GroupNorm(
            rows=x.shape[0],
            channels=x.shape[1],
            groups=groups,
            epsilon=epsilon,
            input=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=bias.data_ptr(),
            output=to.data_ptr(),
        )
        arguments = (ctypes.byref(layer), partials.data_ptr(), ctypes.byref(crew))
        return self._prepared(self._library.ddetr_dense_group_norm, arguments, x, weight, bias, partials, to)

    def max_pool(self, crew: Crew, source: Map, to: Map) -> Callable[[], None]:
        """3x3 maximum with stride 2 of a map that is nowhere negative, with a border of zeros."""
        arguments = (source.address, source.line, to.height, to.width, to.channels, to.address, to.line)
        return self._prepared(self._library.ddetr_dense_max_pool, (*arguments, ctypes.byref(crew)))

    def load_pixels(self, crew: Crew, pixels: Tensor, to: Map) -> None:
        """Copy pixels (3,H,W), contiguous float32, into a map of four channels; at once, not prepared."""
        _, height, width = pixels.shape
        arguments = (pixels.data_ptr(), height, width, to.address, to.line)
        self._prepared(self._library.ddetr_dense_pixels, (*arguments, ctypes.byref(crew)))()

    def _call(self, function: Any, layer: ctypes.Structure, crew: Crew, *kept: object) -> Callable[[], None]:
        return self._prepared(function, (ctypes.byref(layer), ctypes.byref(crew)), *kept)

    def _prepared(self, function: Any, arguments: tuple[Any, ...], *kept: object) -> Callable[[], None]:
        error_string = self._library.ddetr_error_string

        def call(_kept: object = kept) -> None:
            status = function(*arguments)
            if status != 0:
                reason = error_string(status).decode()
                raise KernelError(f"{function.__name__}: failed with code {status} ({reason}). Report this as a bug.")

        return call


def dense_engine(dtype: torch.dtype) -> DenseEngine | None:
    """The best engine of this processor for float32 or bfloat16, or None where there is none.

    Raises KernelError for a library that does not work.
    """
    kernels = _dense_kernels()
    if kernels is None:
        return None
    number = kernels.library.ddetr_dense_engine(_DTYPE_NUMBERS[dtype], native._ISAS[kernels.limit])
    return None if number < 0 else DenseEngine(kernels.library, number, kernels.parallel_for)


def gains_by_bf16() -> bool:
    """Whether our kernels, within DDETR_CPU_ISA, are faster in bfloat16 than in float32. Raises KernelError."""
    kernels = _dense_kernels()
    return kernels is not None and bool(kernels.library.ddetr_dense_gains_by_bf16(native._ISAS[kernels.limit]))


def _dense_kernels() -> native.CpuKernels | None:
    kernels = native.cpu_kernels()
    return kernels if kernels is not None and hasattr(kernels.library, "ddetr_dense_engine") else None
