"""The models that are measured, ready to run exactly as ``ddetr detect`` runs them.

Presets have random weights, so that nothing is downloaded. Time depends on the weights in one way: how far the
sampling points lie apart. A fresh Deformable DETR samples one fixed star everywhere; here the offsets also vary by
about two pixels from query to query, as those of a trained one do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ddetr_cli.bench.tables import Listener
from ddetr_cli.classes import COCO_TABLE, ClassTable
from ddetr_cli.errors import DeviceError
from ddetr_cli.inference.detections import ImageDetections
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.inference.preparation import Prepared
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DetectionModel, DetectorOutput
from ddetr_cli.presets import PRESETS, ModelConfig, get_preset
from ddetr_cli.weights import load_model

RANDOM_WEIGHTS = "random"

# Standard deviation of the offsets of random models, in pixels, and what it takes: a query is a normed embedding
# (variance 1) with a position (1/2) and a level embedding (1) added.
OFFSET_PIXELS = 2.0
_QUERY_VARIANCE = 2.5
# Random class heads answer every query alike; these tell queries apart, so that errors of an answer can be seen.
_CLASS_STD = 0.05


@dataclass(frozen=True)
class BenchModel:
    """A model under the name it was asked for; ``weights`` is ``random`` or the file they came from."""

    name: str
    weights: str
    model: DetectionModel
    config: ModelConfig
    classes: ClassTable


def open_model(name: str, listener: Listener) -> BenchModel:
    """The model called ``name``; a preset never looks for its weights. Raises CheckpointError."""
    if name in PRESETS:
        return random_model(name, get_preset(name))
    loaded = load_model(name, announce=listener.notice)
    for note in loaded.report.notes:
        listener.notice(note)
    return BenchModel(name, str(loaded.source), loaded.model, loaded.config, loaded.classes)


def random_model(name: str, config: ModelConfig) -> BenchModel:
    """A model of ``config`` with random weights, always the same."""
    torch.manual_seed(0)
    model = build_detector(config).eval()
    spread_points(model, config.hidden_dim)
    return BenchModel(name, RANDOM_WEIGHTS, model, config, COCO_TABLE)


@torch.no_grad()
def spread_points(model: nn.Module, channels: int) -> None:
    """Give the random weights of ``model`` (ours or transformers') sampling points and classes that vary."""
    for name, parameter in model.named_parameters():
        if name.endswith("sampling_offsets.weight"):
            nn.init.normal_(parameter, std=OFFSET_PIXELS / (_QUERY_VARIANCE * channels) ** 0.5)
        elif "class_embed" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=_CLASS_STD)


def random_pixels(options_hw: tuple[int, int], batch_size: int) -> Tensor:
    """Noise (B,3,h,w) with the mean and variance of normalised pictures; always the same."""
    return torch.randn(batch_size, 3, *options_hw, generator=torch.Generator().manual_seed(0))


class Subject:
    """One model in one precision with one batch, from prepared pictures to detections on the CPU."""

    def __init__(
        self, model: BenchModel, precision: str, device: torch.device, pixels: Tensor, listener: Listener
    ) -> None:
        self.model, self.asked = model, precision
        batch_size = len(pixels)
        self.predictor = Predictor(
            model, device=device, precision=precision, batch_size=batch_size, on_notice=listener.notice
        )
        height, width = pixels.shape[-2:]
        self._batch = [Prepared(image, (height, width)) for image in pixels]

    @property
    def precision(self) -> str:
        """What it computes in, whatever was asked for."""
        return self.predictor.precision

    @property
    def label(self) -> str:
        """Model and precision, as tables name it."""
        return f"{self.model.name} {self.precision}"

    def run(self) -> list[ImageDetections]:
        """Detections of its batch. Raises DeviceError."""
        found = []
        for result in self.predictor.predict_prepared(self._batch):
            if isinstance(result, DeviceError):
                raise result
            found.append(result)
        return found

    def answer(self) -> tuple[Tensor, Tensor]:
        """What a DETR itself says of its batch: logits (B,Q,K) and boxes_cxcywh (B,Q,4), in float32."""
        outputs = [self.predictor.forward(prepared.pixels[None]) for prepared in self._batch]
        assert all(isinstance(output, DetectorOutput) for output in outputs)
        found = cast("list[DetectorOutput]", outputs)
        return (
            torch.cat([output.logits.float() for output in found]),
            torch.cat([output.boxes_cxcywh.float() for output in found]),
        )


def weights_name(weights: str) -> str:
    """``random``, or the name of a file, as tables show it."""
    return weights if weights == RANDOM_WEIGHTS else Path(weights).name
