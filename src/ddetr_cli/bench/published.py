"""What the authors published: Deformable DETR's README (github.com/fundamentalvision/Deformable-DETR), COCO, V100.

Their FLOPs count a multiply-add once and are a mean over the first 100 pictures of val2017, each at the size the
model sees it (github.com/facebookresearch/detr, issue 110). DETR's rows are those of 500 epochs, whose weights exist;
DETR-DC5 after 50 epochs has AP 35.3, with focal loss and 300 queries 36.2. The weights of Faster R-CNN that are used
here are torchvision's, another training: AP 37.0.
"""

from __future__ import annotations

from dataclasses import dataclass

# What every published model sees of a picture, in pixels.
PUBLISHED_SHORT_SIDE = 800


@dataclass(frozen=True)
class Published:
    """One row of the authors' table, as rounded there.

    AP in per cent; ``train_hours``: V100 hours of the whole training; images per second on a V100 at batch 1 and 4.
    """

    epochs: int
    ap: float
    ap_small: float
    parameters: float
    flops: float
    train_hours: float
    rate_batch1: float
    rate_batch4: float


PUBLISHED: dict[str, Published] = {
    preset: Published(epochs, ap, ap_small, millions * 1e6, giga * 1e9, hours, rate1, rate4)
    for preset, epochs, ap, ap_small, millions, giga, hours, rate1, rate4 in (
        ("fasterrcnn-r50-fpn", 109, 42.0, 26.6, 42, 180, 380, 25.6, 28.0),
        ("detr-r50", 500, 42.0, 20.5, 41, 86, 2000, 27.0, 38.3),
        ("detr-r50-dc5", 500, 43.3, 22.5, 41, 187, 7000, 11.4, 12.4),
        ("r50-single-scale", 50, 39.4, 20.6, 34, 78, 160, 27.0, 42.4),
        ("r50-single-scale-dc5", 50, 41.5, 24.1, 34, 128, 215, 22.1, 29.4),
        ("r50", 50, 44.5, 27.1, 40, 173, 325, 15.0, 19.4),
        ("r50-refine", 50, 46.2, 28.3, 41, 173, 325, 15.0, 19.4),
        ("r50-two-stage", 50, 46.9, 29.6, 41, 173, 340, 14.5, 18.8),
    )
}
