"""What to measure, checked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ddetr_cli.errors import UsageError

# A single number means the short side of a 4:3 picture: what most photographs are, and the size the published FLOPs
# were derived at (800x1066).
ASPECT = (4, 3)

# Sizes outside this range are typing errors: the trunk needs 32 px, and 8192 px is 67 megapixels.
SMALLEST_SIDE, LARGEST_SIDE = 32, 8192

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# What can be measured, in the order it is shown.
LATENCY, SIZES, OP, STAGES, FOLDER, RIVALS = "latency", "sizes", "op", "stages", "folder", "rivals"
CARD, SCALING, TRAIN = "card", "scaling", "train"

# What these two measure unless told otherwise: the systems of the model card in its order, and Deformable DETR with
# two whose attention looks from everywhere to everywhere.
CARD_MODELS = (
    "fasterrcnn-r50-fpn", "detr-r50", "detr-r50-dc5", "r50-single-scale", "r50-single-scale-dc5", "r50", "r50-refine",
    "r50-two-stage",
)  # fmt: skip
SCALING_MODELS = ("r50", "detr-r50", "detr-r50-dc5")


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and how.

    ``models``: presets (random weights), ``demo``, files or hub ids; ``size_hw`` in pixels; ``measurements``: some of
    the names above; ``val2017``: the data set over whose first pictures FLOPs are averaged.
    """

    models: tuple[str, ...]
    size_hw: tuple[int, int] = (800, 1066)
    batch_size: int = 1
    precisions: tuple[str, ...] = ("auto",)
    device: str = "auto"
    rounds: int = 10
    warmup: int = 2
    measurements: tuple[str, ...] = (SIZES, LATENCY)
    val2017: Path | None = None


def split_names(values: Iterable[str], option: str, example: str) -> tuple[str, ...]:
    """The names in ``values``, each of which may hold several with commas, in order and once each.

    Raises UsageError where there are none.
    """
    names = [name.strip() for value in values for name in value.split(",")]
    found = tuple(dict.fromkeys(name for name in names if name))
    if not found:
        raise UsageError(f"{option}: empty. Name at least one, for example {option} {example}.")
    return found


def parse_precisions(text: str) -> tuple[str, ...]:
    """``text`` as names of precisions with commas between. Raises UsageError for an unknown one."""
    names = split_names([text], "--precision", "fp32,bf16")
    for name in names:
        if name not in PRECISIONS:
            raise UsageError(f"--precision {name!r}: unknown. Choose among {', '.join(PRECISIONS)}.")
    return names


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of ``800x1066``, height first, or of ``800``, the short side of a 4:3 picture.

    Raises UsageError for anything else, and for sides outside 32 to 8192 px.
    """
    match = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text.strip().lower())
    if match is None:
        raise UsageError(f"--image-size {text!r}: not a size. Give N or HxW in pixels, for example 800 or 800x1066.")
    height = int(match[1])
    # Truncated, as the model's own size rule does.
    width = int(match[2]) if match[2] else height * ASPECT[0] // ASPECT[1]
    if not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in (height, width)):
        raise UsageError(f"--image-size {text!r}: out of range. Give sides of {SMALLEST_SIDE} to {LARGEST_SIDE} px.")
    return height, width
