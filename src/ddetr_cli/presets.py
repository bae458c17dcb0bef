"""Every variant of the model as one line: frozen dataclasses, stored inside every checkpoint.

Source of the five r50 variants: the authors' configs and arXiv:2010.04159. ``tiny`` is ours: CPUs, demos, tests.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ddetr_cli.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class ModelConfig:
    """All that decides the shape and the arithmetic of a detector; ``image_size`` is its short side in pixels."""

    preset: str
    backbone: str = "resnet50"  # a key of model.backbone.BACKBONES
    dilation: bool = False  # DC5: stride 16 in the last stage, its 3x3 convolutions dilated
    levels: int = 4  # feature maps the transformer sees
    hidden_dim: int = 256
    heads: int = 8
    points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 1024
    dropout: float = 0.1
    queries: int = 300
    refine_boxes: bool = False
    two_stage: bool = False
    classes: int = 91  # width of the class head; COCO category ids index it directly
    image_size: int = 800

    def __post_init__(self) -> None:
        if self.two_stage and not self.refine_boxes:
            raise ValueError(
                "two_stage needs refine_boxes: proposals are boxes, and only refinement starts from boxes"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in the order of the fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The configuration a checkpoint stores. Raises CheckpointError for keys this version does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise CheckpointError(
                f"model configuration: unknown keys {', '.join(unknown)} (written by a newer ddetr). Update ddetr."
            )
        return cls(**values)


PRESETS: dict[str, ModelConfig] = {
    config.preset: config
    for config in (
        ModelConfig("r50"),
        ModelConfig("r50-refine", refine_boxes=True),
        ModelConfig("r50-two-stage", refine_boxes=True, two_stage=True),
        ModelConfig("r50-single-scale", levels=1),
        ModelConfig("r50-single-scale-dc5", levels=1, dilation=True),
        ModelConfig(
            "tiny",
            backbone="resnet-tiny",
            hidden_dim=128,
            encoder_layers=3,
            decoder_layers=3,
            ffn_dim=512,
            dropout=0.0,
            queries=100,
            refine_boxes=True,
            two_stage=True,
            image_size=320,
        ),
    )
}

# Where the authors' weights of a preset live on the Hugging Face hub.
HUB_IDS: dict[str, str] = {
    "r50": "SenseTime/deformable-detr",
    "r50-refine": "SenseTime/deformable-detr-with-box-refine",
    "r50-two-stage": "SenseTime/deformable-detr-with-box-refine-two-stage",
    "r50-single-scale": "SenseTime/deformable-detr-single-scale",
    "r50-single-scale-dc5": "SenseTime/deformable-detr-single-scale-dc5",
}


def get_preset(name: str, **changes: Any) -> ModelConfig:
    """The preset called ``name``, with fields replaced. Raises UsageError naming the presets there are."""
    if name not in PRESETS:
        raise UsageError(f"preset {name!r}: unknown. Choose one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)
