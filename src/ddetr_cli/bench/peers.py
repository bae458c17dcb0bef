"""The programs people would use instead, each with the weights of ours: transformers, ONNX Runtime, OpenVINO.

None of them is needed to run ddetr. The exported graph is that of transformers' model, through torch.export: ONNX
Runtime has no kernel for the older opset that the tracing exporter can reach.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ddetr_cli.bench.subjects import RANDOM_WEIGHTS, BenchModel, spread_points
from ddetr_cli.errors import UsageError
from ddetr_cli.presets import DEFORMABLE_DETR, DETR, PRESETS, ModelConfig
from ddetr_cli.weights import load_model

if TYPE_CHECKING:
    from ddetr_cli.bench.tables import Listener

TRANSFORMERS, ONNX_RUNTIME, OPENVINO, OPENVINO_BF16 = (
    "transformers fp32", "ONNX Runtime fp32", "OpenVINO f32", "OpenVINO bf16",
)  # fmt: skip

# What each needs to be imported; the first is needed for all, for the model is its.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    TRANSFORMERS: ("transformers", "timm"),
    ONNX_RUNTIME: ("transformers", "timm", "onnx", "onnxscript", "onnxruntime"),
    OPENVINO: ("transformers", "timm", "onnx", "onnxscript", "openvino"),
    OPENVINO_BF16: ("transformers", "timm", "onnx", "onnxscript", "openvino"),
}
_OPSET = 20

Answer = tuple[Tensor, Tensor]  # logits (B,Q,K) and boxes_cxcywh (B,Q,4)


@dataclass(frozen=True)
class Peer:
    """Somebody's program, ready to answer for one batch."""

    name: str
    run: Callable[[], Answer]


def missing_packages(name: str) -> list[str]:
    """What would have to be installed for the peer called ``name``."""
    return [package for package in REQUIREMENTS[name] if importlib.util.find_spec(package) is None]


def build_pair(preset: str, folder: Path) -> tuple[nn.Module, BenchModel]:
    """transformers' model of ``preset`` with random weights, and ours with the same, through a file in ``folder``.

    Raises UsageError for what is no preset of the DETR families.
    """
    config = PRESETS.get(preset)
    if config is None or config.family not in (DEFORMABLE_DETR, DETR) or config.backbone != "resnet50":
        known = ", ".join(n for n, c in PRESETS.items() if c.family != "faster-rcnn" and c.backbone == "resnet50")
        raise UsageError(f"--rivals: {preset} has no counterpart in transformers. Choose among {known}.")
    torch.manual_seed(0)
    with quiet():
        theirs = _transformers_model(config).eval()
        spread_points(theirs, config.hidden_dim)
        save = cast("Callable[[Path], None]", theirs.save_pretrained)
        save(folder)
    loaded = load_model(str(folder))
    return theirs, BenchModel(preset, RANDOM_WEIGHTS, loaded.model, loaded.config, loaded.classes)


def build_peers(
    theirs: nn.Module, pixels: Tensor, folder: Path, names: list[str], listener: Listener
) -> tuple[list[Peer], dict[str, str]]:
    """Those of ``names`` that could be made ready, and why the others could not."""
    peers, failures = [], {}
    graph: Path | None = None
    for name in names:
        try:
            if name == TRANSFORMERS:
                peers.append(Peer(name, lambda: _answer_of(theirs(pixel_values=pixels))))
                continue
            if graph is None:
                listener.notice("exporting transformers' model to ONNX takes a minute or two")
                graph = _export(theirs, pixels, folder / "model.onnx")
            run = _onnx_runtime(graph, pixels) if name == ONNX_RUNTIME else _openvino(graph, pixels, name)
            peers.append(Peer(name, run))
        except Exception as error:  # whatever a peer cannot do is an answer too
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return peers, failures


def _transformers_model(config: ModelConfig) -> nn.Module:
    import transformers

    common: dict[str, Any] = {
        "use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": "resnet50",
        "num_labels": config.classes, "dilation": config.dilation,
    }  # fmt: skip
    if config.family == DETR:
        detr: nn.Module = transformers.DetrForObjectDetection(transformers.DetrConfig(**common))
        return detr
    specific = transformers.DeformableDetrConfig(
        num_feature_levels=config.levels,
        with_box_refine=config.refine_boxes,
        two_stage=config.two_stage,
        **common,
    )
    deformable: nn.Module = transformers.DeformableDetrForObjectDetection(specific)
    return deformable


class _PixelsToAnswer(nn.Module):
    """A graph's inputs and outputs are tensors, not the model's own classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Answer:
        return _answer_of(self.model(pixel_values=pixels))


def _answer_of(output: Any) -> Answer:
    return output.logits, output.pred_boxes


def _export(theirs: nn.Module, pixels: Tensor, path: Path) -> Path:
    with quiet(), torch.no_grad():
        program = torch.export.export(_PixelsToAnswer(theirs), (pixels,), strict=False)
        graph = torch.onnx.export(program, dynamo=True, opset_version=_OPSET, verbose=False)
        assert graph is not None  # it is, without a file name
        graph.save(path, external_data=True)
    return path


def _onnx_runtime(graph: Path, pixels: Tensor) -> Callable[[], Answer]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: pixels.numpy()}

    def run() -> Answer:
        logits, boxes = session.run(None, feed)
        return torch.from_numpy(logits), torch.from_numpy(boxes)

    return run


def _openvino(graph: Path, pixels: Tensor, name: str) -> Callable[[], Answer]:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if name == OPENVINO_BF16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(str(graph), "CPU", settings)
    request, array = compiled.create_infer_request(), pixels.numpy()

    def run() -> Answer:
        found = request.infer([array], share_inputs=True)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, no prints, bars, log lines and warnings of the exporter and of transformers."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
