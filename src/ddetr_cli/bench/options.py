"""What to measure, checked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ddetr_cli.errors import UsageError

# A single number means the short side of a 4:3 picture: what most photographs are, and the size the published FLOPs
# were derived at (800x1066).
ASPECT = (4, 3)

# Sizes outside this range are typing errors: the trunk needs 32 px, and 8192 px is 67 megapixels.
SMALLEST_SIDE, LARGEST_SIDE = 32, 8192


@dataclass(frozen=True)
class BenchOptions:
    """One measurement. ``models``: presets (random weights), ``demo``, files or hub ids; ``size_hw`` in pixels."""

    models: tuple[str, ...]
    size_hw: tuple[int, int] = (800, 1066)
    batch_size: int = 1
    precision: str = "fp32"
    device: str = "auto"
    rounds: int = 10
    warmup: int = 2


def split_models(values: Iterable[str]) -> tuple[str, ...]:
    """The names in ``values``, each of which may hold several with commas, in order and once each.

    Raises UsageError where there are none.
    """
    names = [name.strip() for value in values for name in value.split(",")]
    found = tuple(dict.fromkeys(name for name in names if name))
    if not found:
        raise UsageError("--models: no model named. Name at least one, for example --models r50,tiny.")
    return found


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
