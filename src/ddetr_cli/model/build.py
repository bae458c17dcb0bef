"""A model of any family from its configuration."""

from __future__ import annotations

from ddetr_cli.model.detector import DeformableDetr, DetectionModel
from ddetr_cli.presets import DETR, FASTER_RCNN, ModelConfig


def build_detector(config: ModelConfig) -> DetectionModel:
    """A freshly initialised detector of any family, in training mode, on the CPU in float32."""
    # A family is imported when it is built: torchvision, behind the last, takes two seconds to import.
    if config.family == DETR:
        from ddetr_cli.model.detr import Detr

        return Detr(config)
    if config.family == FASTER_RCNN:
        from ddetr_cli.model.faster_rcnn import FasterRcnn

        return FasterRcnn(config)
    return DeformableDetr(config)
