"""Every system as one line: frozen dataclasses, stored inside every checkpoint.

Sources: the five r50 variants, the authors' configs and arXiv:2010.04159; detr-r50 and detr-r50-dc5, DETR's own
defaults (arXiv:2005.12872); fasterrcnn-r50-fpn, torchvision's. ``tiny`` and its relatives are ours: CPUs, demos,
tests, comparisons.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ddetr_cli.errors import CheckpointError, UsageError

# The families of systems: what ``model.build_detector`` builds, and what the rest asks a configuration about.
FAMILIES = DEFORMABLE_DETR, DETR, FASTER_RCNN = "deformable-detr", "detr", "faster-rcnn"


@dataclass(frozen=True)
class ModelConfig:
    """All that decides the shape and the arithmetic of a detector; ``image_size`` is its short side in pixels.

    Fields that a family does not have mean nothing to it: levels, points and boxes between layers are Deformable
    DETR's, and of Faster R-CNN there are backbone, queries (its most detections), classes and image_size.
    """

    preset: str
    family: str = DEFORMABLE_DETR  # one of FAMILIES
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
    classes: int = 91  # COCO category ids index them directly; "no object", one output more, is not counted
    image_size: int = 800

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r}: not one of {', '.join(FAMILIES)}")
        if self.family == FASTER_RCNN and self.backbone != "resnet50":
            raise ValueError(f"backbone {self.backbone!r}: Faster R-CNN is here with a resnet50 only")
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


_TINY: dict[str, Any] = {
    "backbone": "resnet-tiny", "hidden_dim": 128, "encoder_layers": 3, "decoder_layers": 3, "ffn_dim": 512,
    "dropout": 0.0, "queries": 100, "image_size": 320,
}  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    config.preset: config
    for config in (
        ModelConfig("r50"),
        ModelConfig("r50-refine", refine_boxes=True),
        ModelConfig("r50-two-stage", refine_boxes=True, two_stage=True),
        ModelConfig("r50-single-scale", levels=1),
        ModelConfig("r50-single-scale-dc5", levels=1, dilation=True),
        ModelConfig("detr-r50", family=DETR, levels=1, ffn_dim=2048, queries=100),
        ModelConfig("detr-r50-dc5", family=DETR, levels=1, ffn_dim=2048, queries=100, dilation=True),
        ModelConfig("fasterrcnn-r50-fpn", family=FASTER_RCNN, queries=100),
        ModelConfig("tiny", **_TINY, refine_boxes=True, two_stage=True),
        # The same trunk under the plain method, and under DETR with as many parameters: for comparisons on a CPU.
        ModelConfig("tiny-plain", **_TINY),
        ModelConfig("detr-tiny", family=DETR, **{**_TINY, "levels": 1, "ffn_dim": 832}),
    )
}

# Short sides outside this range are typing errors: smaller leaves no feature map, larger fills any memory.
SMALLEST_IMAGE_SIZE, LARGEST_IMAGE_SIZE = 16, 8192

# Where the authors' weights of a preset live on the Hugging Face hub.
HUB_IDS: dict[str, str] = {
    "r50": "SenseTime/deformable-detr",
    "r50-refine": "SenseTime/deformable-detr-with-box-refine",
    "r50-two-stage": "SenseTime/deformable-detr-with-box-refine-two-stage",
    "r50-single-scale": "SenseTime/deformable-detr-single-scale",
    "r50-single-scale-dc5": "SenseTime/deformable-detr-single-scale-dc5",
    "detr-r50": "facebook/detr-resnet-50",
    "detr-r50-dc5": "facebook/detr-resnet-50-dc5",
}


def get_preset(name: str, **changes: Any) -> ModelConfig:
    """The preset called ``name``, with fields replaced. Raises UsageError naming the presets there are."""
    if name not in PRESETS:
        raise UsageError(f"preset {name!r}: unknown. Choose one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)
