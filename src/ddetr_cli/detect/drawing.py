"""Boxes and labels on a picture: readable at any picture size, on any background, without colour vision.

# N boxes of one image
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ddetr_cli.data.images import open_picture
from ddetr_cli.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ddetr_cli.data.images import ImageLike
    from ddetr_cli.inference.results import Detection

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Okabe and Ito's palette, distinct under every common colour blindness. Its black is left out: it outlines.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
_BLACK: Colour = (0, 0, 0)
_WHITE: Colour = (255, 255, 255)

# Letters this high (fraction of the mean side) read well when the picture is fitted to a screen or a page.
_FONT_FRACTION = 0.024
_SMALLEST_FONT = 9  # below this the built-in font is a smear
_CROWD = 25  # from here labels are set smaller, or they hide what they name
_LONGEST_NAME = 40
# A label may take this much of the picture; on a thumbnail it would hide everything, and is left out.
_LABEL_WIDTH_FRACTION = 0.6
_LABEL_HEIGHT_FRACTION = 0.3


def draw(image: ImageLike, detections: Iterable[Detection]) -> Image.Image:
    """A copy of a picture, any that a Detector takes, with what it found in it: as ``ddetr detect`` draws it.

    Raises ImageError for a picture that cannot be read.
    """
    found = list(detections)
    return draw_detections(
        open_picture(image),
        [detection.box for detection in found],
        [detection.class_index for detection in found],
        [detection.score for detection in found],
        [detection.label for detection in found],
    )


def draw_detections(
    image: Image.Image,
    boxes_xyxy_px: Sequence[Box],
    labels: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str] | None,
) -> Image.Image:
    """A copy of the RGB ``image``, without metadata, with N boxes clipped to it, best first, and their names.

    ``labels`` choose the colours; ``names`` are N texts, or None for boxes alone. A label stays inside the picture,
    off other labels where there is room, and is left out where the picture is too small for it.
    """
    canvas = image.convert("RGB") if image.mode != "RGB" else image.copy()
    canvas.info = {}  # Pillow would write a comment, profile or resolution found here into the file
    pen = ImageDraw.Draw(canvas)
    width, height = canvas.size
    line = max(2 if min(width, height) >= 100 else 1, round(min(width, height) / 260))
    shown = [
        (clipped, label, _short(name), f"{score:.2f}")
        for box, label, score, name in zip(boxes_xyxy_px, labels, scores, names or [""] * len(labels), strict=True)
        if (clipped := clip(box, width, height)) is not None
    ]
    # Worst first, so that the best box lies on top.
    for box, label, _, _ in reversed(shown):
        _draw_box(pen, box, PALETTE[label % len(PALETTE)], line)
    if names is not None:
        _draw_labels(pen, shown, canvas.size, load_font(_font_size(width, height, len(shown))), line)
    return canvas


def _draw_box(pen: ImageDraw.ImageDraw, box: Box, colour: Colour, line: int) -> None:
    x0, y0, x1, y1 = box
    edge = max(1, line // 3)
    # A dark rim on the inside keeps a light colour visible on a light background.
    if x1 - x0 > 4 * (line + edge) and y1 - y0 > 4 * (line + edge):
        pen.rectangle((x0, y0, x1, y1), outline=_BLACK, width=line + edge)
    pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)


def _draw_labels(
    pen: ImageDraw.ImageDraw,
    shown: Sequence[tuple[Box, int, str, str]],
    size_wh: tuple[int, int],
    font: Font,
    line: int,
) -> None:
    placed: list[Box] = []
    chips = []
    pad = max(1, line)
    # One height for all labels, whether or not their letters reach below the line.
    _, top, _, bottom = font.getbbox("Ag")
    height = int(bottom - top) + 2 * pad + 1
    if height > _LABEL_HEIGHT_FRACTION * size_wh[1]:
        return
    for box, label, name, score in shown:
        text = _fit(name, score, font, _LABEL_WIDTH_FRACTION * size_wh[0] - 2 * pad - 1)
        if text is None:
            continue
        left, _, right, _ = font.getbbox(text)
        chip = _place(box, (int(right - left) + 2 * pad + 1, height), size_wh, placed)
        placed.append(chip)
        chips.append((chip, label, text, (chip[0] + pad - left, chip[1] + pad - top)))
    # Worst first here too: where labels must overlap, the better one is whole.
    for chip, label, text, corner in reversed(chips):
        colour = PALETTE[label % len(PALETTE)]
        pen.rectangle(chip, fill=colour, outline=_BLACK if line > 1 else None)
        pen.text(corner, text, fill=_ink(colour), font=font)


def _fit(name: str, score: str, font: Font, room: float) -> str | None:
    """Name and score, or the name alone, or its beginning: the most that is at most ``room`` pixels wide."""
    for text in (f"{name} {score}", name, *(f"{name[:kept]}..." for kept in range(len(name) - 1, 3, -1))):
        left, _, right, _ = font.getbbox(text)
        if right - left <= room:
            return text
    return None


def _place(box: Box, chip_wh: tuple[int, int], size_wh: tuple[int, int], placed: Sequence[Box]) -> Box:
    """Where the label of ``box`` goes: the first spot at the box, inside the picture, that no label holds."""
    x0, y0, x1, y1 = box
    w, h = chip_wh
    spots = ((x0, y0 - h), (x1 - w, y0 - h), (x0, y1 + 1), (x1 - w, y1 + 1), (x0, y0), (x0, y1 - h), (x1 - w, y1 - h))
    fallback: Box | None = None
    for left, top in spots:
        chip = (left, top, left + w - 1, top + h - 1)
        is_inside = left >= 0 and top >= 0 and chip[2] < size_wh[0] and chip[3] < size_wh[1]
        if is_inside:
            fallback = fallback or chip
            if not any(_overlap(chip, other) for other in placed):
                return chip
    if fallback is not None:
        return fallback
    left = min(max(0.0, x0), size_wh[0] - w)
    top = min(max(0.0, y0 - h), size_wh[1] - h)
    return (left, top, left + w - 1, top + h - 1)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def clip(box: Box, width: int, height: int) -> tuple[int, int, int, int] | None:
    """The part of ``box`` on the picture in whole pixels, at least one; None where it lies wholly outside."""
    x0, y0, x1, y1 = box
    if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
        return None
    left, top = (min(max(0, int(value)), side - 1) for value, side in ((x0, width), (y0, height)))
    right, bottom = (min(max(0, int(value)), side - 1) for value, side in ((x1, width), (y1, height)))
    return (left, top, max(left, right), max(top, bottom))


def _font_size(width: int, height: int, count: int) -> int:
    # The short side bounds it too: a panorama's mean side says nothing about its height.
    size = min(_FONT_FRACTION * (width + height) / 2, 0.2 * min(width, height))
    return max(_SMALLEST_FONT, round(size * (0.75 if count > _CROWD else 1)))


@lru_cache(maxsize=32)
def load_font(size: int) -> Font:
    """The font that comes with Pillow, in letters of ``size`` pixels."""
    return ImageFont.load_default(size)


def _ink(background: Colour) -> Colour:
    """Black or white, whichever stands out from ``background`` (Rec. 709 luma)."""
    luma = 0.2126 * background[0] + 0.7152 * background[1] + 0.0722 * background[2]
    return _BLACK if luma > 110 else _WHITE


def spell(text: str) -> str:
    """One line of ``text`` in the letters of Pillow's built-in font (ASCII): accents dropped, ? for the rest."""
    plain = unicodedata.normalize("NFKD", printable(text))
    return "".join(c if c.isascii() else "?" for c in plain if not unicodedata.combining(c))


def _short(name: str) -> str:
    """A class name fit for a label, not endless."""
    text = spell(name[: 4 * _LONGEST_NAME])
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 3] + "..."
