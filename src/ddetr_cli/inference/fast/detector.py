"""A whole model on the dense kernels.

# B batch, H, W image height and width
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ddetr_cli.inference.fast.decoder import Decoder
from ddetr_cli.inference.fast.encoder import Encoder
from ddetr_cli.inference.fast.trunk import Trunk
from ddetr_cli.inference.fast.workspace import PartStep, Plan, Workspace
from ddetr_cli.model.detector import DeformableDetr, DetectorOutput
from ddetr_cli.ops.dense import DenseEngine, Map, dense_engine, gains_by_bf16, return_free_memory

# Image sizes whose plans are kept: a folder has a few. Each holds reference points, about a megabyte.
_PLANS = 8

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Around every step: what to enter while a part of the model, by its name, is computed.
Watch = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class _Prepared:
    plan: Plan
    pixels: Map
    steps: list[PartStep]
    version: int


class FastDetector:
    """Called like the model, with its weights as they were when this was made; for inference on the CPU.

    Every image is computed alone, so its result is bit-identical whatever its neighbours, and whatever the number of
    threads. ``proposals`` of two-stage models are not returned. Batches with padding go to the model itself, as do
    tensors that are not float32. ``watch`` may be set, to see what takes how long.
    """

    def __init__(self, model: DeformableDetr, engine: DenseEngine) -> None:
        self.engine_name = engine.name
        self._model, self._engine = model, engine
        config = model.config
        # Packing frees more than it keeps, and glibc would hold on to that to the end.
        self._trunk = Trunk(engine, model.backbone, list(model.input_proj))
        return_free_memory()
        self._encoder, self._decoder = Encoder(engine, model), Decoder(engine, model)
        return_free_memory()
        self._scratch_bytes = engine.scratch_bytes(config.hidden_dim, config.ffn_dim)
        self.watch: Watch = lambda _: nullcontext()
        self._workspace = Workspace()
        self._prepared: OrderedDict[tuple[int, int, int], _Prepared] = OrderedDict()
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, is_padding: Tensor | None = None) -> DetectorOutput:
        """Predict for normalised pixels (B,3,H,W) with padding (B,H,W), True = padding, or None for none."""
        if pixels.dtype != torch.float32 or (is_padding is not None and bool(is_padding.any())):
            out: DetectorOutput = self._model(pixels, is_padding)
            return out
        with self._lock:
            found = [self._run(image.contiguous()) for image in pixels]
        return DetectorOutput(
            torch.cat([one.logits for one in found]), torch.cat([one.boxes_cxcywh for one in found])
        )

    def _run(self, pixels: Tensor) -> DetectorOutput:
        prepared = self._prepare(pixels.shape[-2], pixels.shape[-1])
        with self.watch("backbone"):
            self._engine.load_pixels(prepared.plan.crew, pixels, prepared.pixels)
        out: object = None
        for step in prepared.steps:
            with self.watch(step.part):
                out = step.run()
        assert isinstance(out, DetectorOutput)
        return out

    def _prepare(self, height: int, width: int) -> _Prepared:
        key = (height, width, torch.get_num_threads())
        prepared = self._prepared.get(key)
        if prepared is None or prepared.version != self._workspace.version:
            prepared = self._prepared[key] = self._draw_up(*key)
            if len(self._prepared) > _PLANS:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return prepared

    def _draw_up(self, height: int, width: int, threads: int) -> _Prepared:
        plan = Plan(self._engine, threads, self._workspace)
        level_hw = self._trunk.level_sizes(height, width)
        rows = sum(h * w for h, w in zip(level_hw[0::2], level_hw[1::2], strict=True))
        memory = plan.place("memory", rows, self._model.config.hidden_dim)
        plan.phase = "trunk"
        pixels = self._trunk.add_to(plan, height, width, memory)
        plan.phase = "transformer"
        self._encoder.add_to(plan, level_hw, memory)
        self._decoder.add_to(plan, level_hw, memory)
        steps = plan.prepare(self._scratch_bytes)
        return _Prepared(plan, plan.map(pixels), steps, self._workspace.version)


def accelerate(model: nn.Module, precision: str = "fp32") -> FastDetector | None:
    """The fast path of ``model`` in ``fp32`` or ``bf16``, or None where this machine or this model has none.

    It is a snapshot: make it anew after the weights have changed. Raises KernelError for a native library that does
    not work.
    """
    engine = dense_engine(_DTYPES[precision]) if precision in _DTYPES else None
    if engine is None or not _is_taken(model, engine):
        return None
    return FastDetector(model, engine)


def best_precision(model: nn.Module) -> str:
    """``bf16`` where the processor multiplies faster in it and ``model`` has a fast path, else ``fp32``.

    With bf16 the demo model finds what it finds with fp32: on 400 generated scenes AP 0.6141 with both.
    """
    engine = dense_engine(torch.bfloat16)
    return "bf16" if engine is not None and gains_by_bf16() and _is_taken(model, engine) else "fp32"


def _is_taken(model: nn.Module, engine: DenseEngine) -> TypeGuard[DeformableDetr]:
    """Whether it is a model whose every width the engine's kernels take."""
    if not isinstance(model, DeformableDetr) or model.config.levels > 4:
        return False
    config, unit = model.config, max(engine.form.panel, engine.form.depth_step)
    widths = [config.hidden_dim, config.ffn_dim]
    widths += [conv.out_channels for conv in model.backbone.modules() if isinstance(conv, nn.Conv2d)]
    return all(width % unit == 0 for width in widths)
