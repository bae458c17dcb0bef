"""A stopwatch for nested parts, and the parts of a model, in its own modules or on the fast path of a CPU.

Every moment belongs to the innermost part that is running, and to no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ddetr_cli.inference.fast import FastDetector
from ddetr_cli.model.detector import DetectionModel
from ddetr_cli.presets import FASTER_RCNN

REST = "rest of the model"

_DETR_PARTS = {
    "backbone": ["backbone"],
    "input projections": ["input_proj"],
    "encoder": ["transformer.encoder.layers"],
    "decoder": ["transformer.decoder.layers"],
    "heads": ["class_embed", "bbox_embed"],
}
_FASTER_RCNN_PARTS = {
    "backbone": ["backbone.body"],
    "feature pyramid": ["backbone.fpn"],
    "proposals": ["rpn"],
    "heads": ["roi_heads"],
}


class PartClock:
    """Seconds by part since the last ``take``. On a GPU it waits at every boundary, which makes the whole slower."""

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def enter(self, part: str) -> None:
        """``part`` begins, inside whatever is running."""
        self._charge()
        self._running.append(part)

    def leave(self) -> None:
        """The part that began last ends."""
        self._charge()
        self._running.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside is ``name``."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last time."""
        taken, self._seconds = self._seconds, {}
        return taken

    @contextmanager
    def watching(self, parts: dict[str, list[nn.Module]], fast: object = None) -> Iterator[None]:
        """Inside, a call of any of these modules is the part it is listed under; a step of ``fast`` names its own."""
        hooks = []
        for name, modules in parts.items():
            for module in modules:
                hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.enter(name)))
                hooks.append(module.register_forward_hook(lambda *_: self.leave()))
        try:
            with self._watching_steps(fast):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _watching_steps(self, fast: object) -> Iterator[None]:
        if not isinstance(fast, FastDetector):
            yield
            return
        before, fast.watch = fast.watch, self.part
        try:
            yield
        finally:
            fast.watch = before

    def _charge(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] = self._seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now


def model_parts(model: DetectionModel) -> dict[str, list[nn.Module]]:
    """The modules of each part of a model, by the names of the stages; what is in none is the rest."""
    parts: dict[str, list[nn.Module]] = {}
    for part, paths in (_FASTER_RCNN_PARTS if model.config.family == FASTER_RCNN else _DETR_PARTS).items():
        modules = [model.get_submodule(path) for path in paths]
        # Lists of modules are not called themselves.
        parts[part] = [m for module in modules for m in (module if isinstance(module, nn.ModuleList) else [module])]
    return parts
