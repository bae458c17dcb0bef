"""``csrc/include/ddetr_dense.h`` for ctypes: its structures and prototypes, word for word; a test compares them."""

from __future__ import annotations

import ctypes
from typing import Any

POINTER, I32, I64, F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class EngineForm(ctypes.Structure):
    """``ddetr_engine_form``."""

    _fields_ = [
        (name, I64) for name in ("panel", "pair", "depth_step", "block_rows", "element_bytes", "weight_bytes")
    ]


class Crew(ctypes.Structure):
    """``ddetr_crew``."""

    _fields_ = [
        ("engine", I32),
        ("threads", I32),
        ("parallel_for", POINTER),
        ("scratch", POINTER),
        ("scratch_bytes", I64),
    ]


class Product(ctypes.Structure):
    """``ddetr_product``."""

    _fields_ = [
        *[(name, I64) for name in ("lines", "width", "taps_y", "taps_x", "depth")],
        *[(name, I64) for name in ("input_line", "input_pixel", "tap_line", "tap_pixel", "columns")],
        *[(name, I64) for name in ("output_line", "output_pixel", "added_line", "added_pixel")],
        *[(name, I64) for name in ("group", "output_group")],
        *[(name, I32) for name in ("relu", "output_is_float")],
        *[(name, POINTER) for name in ("input", "packed", "bias", "added", "output", "second")],
        *[(name, I64) for name in ("second_line", "second_pixel", "second_depth")],
    ]


class AttentionInputs(ctypes.Structure):
    """``ddetr_attention_inputs``."""

    _fields_ = [
        ("levels", I64),
        ("level_hw", POINTER),
        *[(name, I64) for name in ("channels", "value_group", "value_output_group", "value_pixel")],
        ("projected_columns", I64),
        *[(name, POINTER) for name in ("x", "line_positions", "column_positions", "packed_value", "value_bias")],
        *[(name, POINTER) for name in ("packed_projection", "projection_bias", "value", "projected")],
    ]


class FeedForward(ctypes.Structure):
    """``ddetr_feed_forward``."""

    _fields_ = [
        *[(name, I64) for name in ("rows", "channels", "hidden")],
        ("epsilon", F32),
        ("is_float", I32),
        *[(name, POINTER) for name in ("sampled", "x", "output", "packed_output", "packed_1", "packed_2")],
        *[(name, POINTER) for name in ("output_bias", "bias_1", "bias_2")],
        *[(name, POINTER) for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")],
    ]


class GroupNorm(ctypes.Structure):
    """``ddetr_group_norm``."""

    _fields_ = [
        *[(name, I64) for name in ("rows", "channels", "groups")],
        ("epsilon", F32),
        *[(name, POINTER) for name in ("input", "weight", "bias", "output")],
    ]


_CREW = ctypes.POINTER(Crew)

# function: (result, arguments)
PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "ddetr_dense_engine": (I32, [I32, I32]),
    "ddetr_dense_gains_by_bf16": (I32, [I32]),
    "ddetr_dense_engine_form": (I32, [I32, ctypes.POINTER(EngineForm)]),
    "ddetr_dense_product": (I32, [ctypes.POINTER(Product), _CREW]),
    "ddetr_dense_scratch_bytes": (I64, [I32, I64, I64]),
    "ddetr_dense_attention_inputs": (I32, [ctypes.POINTER(AttentionInputs), _CREW]),
    "ddetr_dense_feed_forward": (I32, [ctypes.POINTER(FeedForward), _CREW]),
    "ddetr_dense_group_norm": (I32, [ctypes.POINTER(GroupNorm), POINTER, _CREW]),
    "ddetr_dense_pixels": (I32, [POINTER, I64, I64, POINTER, I64, _CREW]),
    "ddetr_dense_max_pool": (I32, [POINTER, I64, I64, I64, I64, POINTER, I64, _CREW]),
}
