"""Boxes and labels on a picture: readable at any picture size, on any background, without colour vision.

# N boxes of one image
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ddetr_cli.data.images import open_picture
from ddetr_cli.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ddetr_cli.classes import CategoryId
    from ddetr_cli.data.images import ImageLike
    from ddetr_cli.inference.results import Detection

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Okabe and Ito's palette without its black, which outlines, and nine more, each as far as can be from black, white
# and all before it: under every common colour blindness any two differ by 15 or more in CIELAB.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (160, 0, 255), (128, 0, 0), (64, 32, 160), (0, 255, 160), (128, 0, 96), (224, 0, 64), (160, 192, 96),
    (224, 64, 255), (192, 224, 255),
)  # fmt: skip
_BLACK: Colour = (0, 0, 0)
_WHITE: Colour = (255, 255, 255)

# Letters this high (fraction of the mean side) read well when the picture is fitted to a screen or a page.
_FONT_FRACTION = 0.024
_SMALLEST_FONT = 9  # below this the built-in font is a smear
_CROWD = 25  # from here labels are set smaller, by the boxes they name
_CROWDED_FRACTION = 0.4  # of the height of such a box
# A label that hides more of the boxes around it than one whole one is left out: the box says where the thing is.
_MOST_HIDDEN = 1.0
_LONGEST_NAME = 40
# Latin letters that are no letter with an accent.
_LATIN = str.maketrans({
    "ß": "ss", "æ": "ae", "Æ": "AE", "ø": "o", "Ø": "O", "œ": "oe", "Œ": "OE", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D",
    "ı": "i", "þ": "th", "Þ": "Th", "ð": "d",
})  # fmt: skip
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
        [label_name(detection.label, detection.category_id) for detection in found],
    )


def draw_detections(
    image: Image.Image,
    boxes_xyxy_px: Sequence[Box],
    labels: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str] | None,
) -> Image.Image:
    """A copy of the RGB ``image``, without metadata, with N boxes clipped to it, best first, and their names.

    ``labels`` choose the colours; ``names`` are N texts, or None for boxes alone. Labels stay inside the picture and
    off each other, better ones first: where the names find no room there are scores, and then nothing.
    """
    canvas = image.convert("RGB") if image.mode != "RGB" else image.copy()
    canvas.info = {}  # Pillow would write a comment, profile or resolution found here into the file
    pen = ImageDraw.Draw(canvas)
    width, height = canvas.size
    shown = [
        (clipped, label, _short(name), f"{score:.2f}")
        for box, label, score, name in zip(boxes_xyxy_px, labels, scores, names or [""] * len(labels), strict=True)
        if (clipped := clip(box, width, height)) is not None
    ]
    boxes = np.array([box for box, *_ in shown], dtype=np.float64).reshape(-1, 4)
    line = max(2 if min(width, height) >= 100 else 1, round(min(width, height) / 260))
    if len(shown) > _CROWD:
        line = max(1, min(line, round(_side(boxes) / 16)))
    # Worst first, so that the best box lies on top.
    for box, label, _, _ in reversed(shown):
        _draw_box(pen, box, PALETTE[label % len(PALETTE)], line)
    if names is not None:
        _draw_labels(pen, shown, boxes, canvas.size, load_font(_font_size(width, height, boxes)), line)
    return canvas


def _draw_box(pen: ImageDraw.ImageDraw, box: Box, colour: Colour, line: int) -> None:
    x0, y0, x1, y1 = box
    edge = max(1, line // 3)
    # A rim on the inside keeps a light colour visible on a light background, and a dark one on a dark background.
    if x1 - x0 > 4 * (line + edge) and y1 - y0 > 4 * (line + edge):
        pen.rectangle((x0, y0, x1, y1), outline=_ink(colour), width=line + edge)
    pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)


def _draw_labels(
    pen: ImageDraw.ImageDraw,
    shown: Sequence[tuple[Box, int, str, str]],
    boxes: NDArray[np.float64],
    size_wh: tuple[int, int],
    font: Font,
    line: int,
) -> None:
    pad = max(1, min(line, round(font.getbbox("Ag")[3] / 6)))
    # One height for all labels, whether or not their letters reach below the line.
    _, top, _, bottom = font.getbbox("Ag")
    height = int(bottom - top) + 2 * pad + 1
    if height > _LABEL_HEIGHT_FRACTION * size_wh[1]:
        return
    placed = np.zeros((0, 4))
    for box, label, name, score in shown:
        texts = (_fit(name, score, font, _LABEL_WIDTH_FRACTION * size_wh[0] - 2 * pad - 1), score)
        for text in dict.fromkeys(text for text in texts if text is not None):
            left, _, right, _ = font.getbbox(text)
            chip = _place(box, (int(right - left) + 2 * pad + 1, height), size_wh, placed, boxes)
            if chip is None:
                continue
            placed = np.concatenate((placed, [chip]))
            colour = PALETTE[label % len(PALETTE)]
            pen.rectangle(chip, fill=colour, outline=_BLACK if line > 1 else None)
            pen.text((chip[0] + pad - left, chip[1] + pad - top), text, fill=_ink(colour), font=font)
            break


def _fit(name: str, score: str, font: Font, room: float) -> str | None:
    """Name and score, or the name alone, or its beginning: the most that is at most ``room`` pixels wide."""
    for text in (f"{name} {score}", name, *(f"{name[:kept]}..." for kept in range(len(name) - 1, 3, -1))):
        left, _, right, _ = font.getbbox(text)
        if right - left <= room:
            return text
    return None


def _place(
    box: Box,
    chip_wh: tuple[int, int],
    size_wh: tuple[int, int],
    placed: NDArray[np.float64],
    boxes: NDArray[np.float64],
) -> Box | None:
    """Where the label of ``box`` goes: at the box, inside the picture, on no other label, where it hides least.

    None where there is no such place.
    """
    x0, y0, x1, y1 = box
    w, h = chip_wh
    middle = (x0 + x1 - w) / 2
    corners = np.array([
        (x0, y0 - h), (x1 - w, y0 - h), (middle, y0 - h), (x0, y1 + 1), (x1 - w, y1 + 1), (middle, y1 + 1),
        (x0, y0), (x1 - w, y0), (x0, y1 - h), (x1 - w, y1 - h), (x1 + 1, y0), (x0 - w, y0), (x1 + 1, y1 - h),
        (x0 - w, y1 - h),
    ]).round()  # fmt: skip
    # A label wider than the box may slide along it to stay inside the picture.
    corners[:6, 0] = corners[:6, 0].clip(0, max(0, size_wh[0] - w))
    chips = np.concatenate((corners, corners + np.array((w - 1, h - 1))), axis=1)
    is_free = (chips[:, :2] >= 0).all(1) & (chips[:, 2:] < size_wh).all(1) & ~(_common(chips, placed) > 0).any(1)
    if not is_free.any():
        return None
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    hidden = (_common(chips, boxes) / areas).sum(1)
    # Places that hide about as much as each other are taken in their order.
    cost = np.where(is_free, hidden.round(1) + 0.01 * np.arange(len(chips)), np.inf)
    best = int(cost.argmin())
    if len(boxes) > _CROWD and hidden[best] > _MOST_HIDDEN:
        return None
    left, top, right, bottom = chips[best].tolist()
    return left, top, right, bottom


def _common(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many pixels each of a (N,4) shares with each of b (M,4); the corners belong to them."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2]) + 1
    return np.asarray(sides.clip(0).prod(axis=2))


def clip(box: Box, width: int, height: int) -> tuple[int, int, int, int] | None:
    """The part of ``box`` on the picture in whole pixels, at least one; None where it lies wholly outside."""
    x0, y0, x1, y1 = box
    if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
        return None
    left, top = (min(max(0, int(value)), side - 1) for value, side in ((x0, width), (y0, height)))
    right, bottom = (min(max(0, int(value)), side - 1) for value, side in ((x1, width), (y1, height)))
    return (left, top, max(left, right), max(top, bottom))


def _font_size(width: int, height: int, boxes: NDArray[np.float64]) -> int:
    # The short side bounds it too: a panorama's mean side says nothing about its height.
    size = min(_FONT_FRACTION * (width + height) / 2, 0.2 * min(width, height))
    if len(boxes) > _CROWD:
        size = min(0.75 * size, _CROWDED_FRACTION * _side(boxes))
    return max(_SMALLEST_FONT, round(size))


def _side(boxes: NDArray[np.float64]) -> float:
    """The shorter side of a box in the middle of them all."""
    return float(np.median((boxes[:, 2:] - boxes[:, :2]).min(axis=1)))


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
    plain = unicodedata.normalize("NFKD", printable(text)).translate(_LATIN)
    return "".join(c if c.isascii() else "?" for c in plain if not unicodedata.combining(c))


def label_name(name: str, category_id: CategoryId) -> str:
    """What a label calls a class: its name or, where most of that is in letters the font has not, its id."""
    spelled = spell(name)
    lost = spelled.count("?") - name.count("?")
    return f"class {category_id}" if 2 * lost > len(spelled.replace(" ", "")) else name


def _short(name: str) -> str:
    """A class name fit for a label, not endless."""
    text = spell(name[: 4 * _LONGEST_NAME])
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 3] + "..."
