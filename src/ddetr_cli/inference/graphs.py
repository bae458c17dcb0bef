"""Inference on a GPU by replay of CUDA graphs: one launch for a whole model, instead of a thousand.

A graph serves one shape of batch. It is captured when that shape comes for the second time, because capturing takes
as long as several ordinary runs, and the ordinary first run lets libraries choose their kernels.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ddetr_cli.errors import UsageError
from ddetr_cli.inference.derived import DerivedDetector, can_derive
from ddetr_cli.model.detector import DeformableDetr, DetectorOutput

# Graphs that are kept; each holds the memory of one run.
MOST_GRAPHS = 8

Run = Callable[[Tensor], DetectorOutput]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Captured(Protocol):
    """A run that was captured: its input, its output, and how to run it again."""

    @property
    def pixels(self) -> Tensor: ...
    @property
    def output(self) -> DetectorOutput: ...
    def replay(self) -> None: ...


@dataclass(frozen=True)
class CudaGraph:
    """A run on a GPU in memory of its own; ``constants`` keeps alive what it reads besides."""

    pixels: Tensor
    output: DetectorOutput
    graph: torch.cuda.CUDAGraph
    constants: object

    def replay(self) -> None:
        self.graph.replay()

    @staticmethod
    def capture(run: Run, pixels: Tensor) -> CudaGraph:
        """Capture ``run`` of a copy of ``pixels``, which run has seen the shape of before."""
        kept, graph = pixels.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.device(pixels.device), torch.cuda.graph(graph):
            output = run(kept)
        return CudaGraph(kept, output, graph, getattr(run, "constants", None))


class GraphDetector:
    """Called like a model on normalised pixels (B,3,H,W) without padding; its outputs are the caller's to keep.

    One thread at a time, as ``Predictor`` calls it.
    """

    def __init__(self, run: Run, capture: Callable[[Run, Tensor], Captured] = CudaGraph.capture) -> None:
        self._run, self._capture = run, capture
        self._graphs: OrderedDict[torch.Size, Captured | None] = OrderedDict()  # None: seen once

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> DetectorOutput:
        shape = pixels.shape
        if shape not in self._graphs:
            self._graphs[shape] = None
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
            return self._run(pixels)
        captured = self._graphs[shape]
        if captured is None:
            captured = self._graphs[shape] = self._capture(self._run, pixels)
        self._graphs.move_to_end(shape)
        captured.pixels.copy_(pixels)
        captured.replay()
        return DetectorOutput(captured.output.logits.clone(), captured.output.boxes_cxcywh.clone())


def accelerate_on_gpu(model: nn.Module, precision: str) -> GraphDetector | None:
    """The derived model of ``model`` in ``precision`` behind graphs, or None where that was not asked for.

    Asked for by ``DDETR_CUDA_INFERENCE=fast``, and not the default before a GPU has proved it. Raises UsageError for
    another word than plain or fast.
    """
    wanted = os.environ.get("DDETR_CUDA_INFERENCE") or "plain"
    if wanted not in ("plain", "fast"):
        raise UsageError(f"DDETR_CUDA_INFERENCE={wanted}: unknown. Use plain or fast, or leave it unset.")
    if wanted == "plain" or not can_derive(model):
        return None
    assert isinstance(model, DeformableDetr)
    device = next(model.parameters()).device
    return GraphDetector(DerivedDetector(model, _DTYPES[precision]).to(device))
