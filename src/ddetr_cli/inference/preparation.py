"""Pictures to what a model sees of them: the one place where the systems prepare differently.

# h and w network size
Everything here may run on any thread, beside the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddetr_cli.data.pixels import MEAN, STD, network_size, to_pixels
from ddetr_cli.errors import UsageError
from ddetr_cli.presets import FASTER_RCNN

if TYPE_CHECKING:
    from PIL.Image import Image

    from ddetr_cli.inference.tiles import Tiling

Preprocess = Literal["original", "hf"]


@dataclass(frozen=True)
class Prepared:
    """One picture ready for the model: normalised float32 pixels (3,h,w), and the picture's own (height, width).

    One that goes in tiles: its own uint8 pixels (H,W,3), of which tiles are made one by one, and its ``whole`` view.
    """

    pixels: Tensor
    size_hw: tuple[int, int]
    whole: Prepared | None = None


@dataclass(frozen=True)
class Preparation:
    """How pictures become pixels for the models of one family: the short side in pixels, and whose size rule.

    With ``tiles`` pictures larger than one are not resized, except for the whole view of them. ``hf`` is that of
    transformers, which the DETR families have; Faster R-CNN is prepared as torchvision does it. Raises UsageError for
    a rule that is unknown or not the family's.
    """

    family: str
    image_size: int
    preprocess: Preprocess = "original"
    tiles: Tiling | None = None

    def __post_init__(self) -> None:
        if self.preprocess not in get_args(Preprocess):
            raise UsageError(f"preprocess {self.preprocess!r}: unknown. Choose original or hf.")
        if self.family == FASTER_RCNN and self.preprocess != "original":
            raise UsageError("preprocess 'hf': not for Faster R-CNN (transformers has none). Leave it out.")

    @property
    def reducible_to(self) -> int | None:
        """The short side for which large JPEGs may be decoded reduced; None where it would be another picture.

        Tiles are cut out of every pixel, and Faster R-CNN's resizing does not smooth.
        """
        return None if self.tiles is not None or self.family == FASTER_RCNN else self.image_size

    def __call__(self, image: Image, size_hw: tuple[int, int] | None = None) -> Prepared:
        """What the model sees of an upright RGB picture; ``size_hw``: of the whole, where ``image`` is reduced."""
        size_hw = (image.height, image.width) if size_hw is None else size_hw
        if self.tiles is not None and len(self.tiles.views(image.width, image.height)) > 1:
            # np.array, not asarray: torch wants memory it may write to.
            return Prepared(torch.from_numpy(np.array(image)), size_hw, replace(self, tiles=None)(image))
        if self.family == FASTER_RCNN:
            return Prepared(_torchvision_pixels(image, self.image_size), size_hw)
        seen_hw = network_size(size_hw[1], size_hw[0], self.image_size, rule=self.preprocess)
        return Prepared(to_pixels(image, seen_hw), size_hw)


def _torchvision_pixels(image: Image, short: int) -> Tensor:
    """Pixels as GeneralizedRCNNTransform makes them: normalised first, then resized without antialiasing.

    Its published AP is with this: the sides are truncated, the long one at most ``short`` * 1333 / 800.
    """
    height, width = image.height, image.width
    # np.array, not asarray: torch wants memory it may write to.
    channels_last = torch.from_numpy(np.array(image))
    pixels = channels_last.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels.div_(255).sub_(mean).div_(std)
    scale = min(short / min(height, width), (short * 1333 // 800) / max(height, width))
    size = [max(1, int(side * scale)) for side in (height, width)]
    return F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
