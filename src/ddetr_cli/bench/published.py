"""What the authors published: Deformable DETR's README (github.com/fundamentalvision/Deformable-DETR), COCO, V100.

Their FLOPs count a multiply-add once and are a mean over the first 100 pictures of val2017, each at the size the
model sees it (github.com/facebookresearch/detr, issue 110).
"""

from __future__ import annotations

from dataclasses import dataclass

# What every published model sees of a picture, in pixels.
PUBLISHED_SHORT_SIDE = 800


@dataclass(frozen=True)
class Published:
    """One row of the authors' table, as rounded there."""

    parameters: float
    flops: float


PUBLISHED: dict[str, Published] = {
    preset: Published(millions * 1e6, giga * 1e9)
    for preset, millions, giga in (
        ("r50", 40, 173),
        ("r50-refine", 41, 173),
        ("r50-two-stage", 41, 173),
        ("r50-single-scale", 34, 78),
        ("r50-single-scale-dc5", 34, 128),
        ("detr-r50", 41, 86),
        ("detr-r50-dc5", 41, 187),
        ("fasterrcnn-r50-fpn", 42, 180),
    )
}
