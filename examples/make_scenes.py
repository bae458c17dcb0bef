"""Write synthetic scenes with exact boxes, as a COCO data set, to train and try ddetr without any download.

    python examples/make_scenes.py OUT --count N --seed S [--split NAME] [--scale N]

writes ``OUT/images/scene-S-*.jpg`` and ``OUT/annotations/NAME.json``. A scene is decided by its seed and its index
alone: give every split another seed, or they share pictures. Needs Pillow and numpy only. What it does not do:
pretend to be photographs; a model trained on these pictures knows these six shapes and nothing else.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float32]
Points = NDArray[np.float64]  # (N,2), x then y

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")

SMALLEST_PX = 8.0  # longer side of the smallest box
SMALL_PX = 16.0  # below this only a few pixels tell the classes apart
SMALL_SHARE = 0.10
MOST_HIDDEN = 0.55  # an object that would hide more than this of another is not placed
MOST_OUTSIDE = 0.15  # share of a shape that may lie beyond the edge of the picture


@dataclass(frozen=True)
class Shape:
    """One object: its class, and its loops in pixels (the second loop, if any, is a hole)."""

    label: int
    loops: tuple[Points, ...]

    def box_xyxy(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The extent of the whole shape, hidden parts included, clipped to the picture; pixel i covers [i, i+1)."""
        (x0, y0), (x1, y1) = self.loops[0].min(axis=0), self.loops[0].max(axis=0)
        return max(0.0, float(x0)), max(0.0, float(y0)), min(float(width), float(x1)), min(float(height), float(y1))


@dataclass(frozen=True)
class Scene:
    """A picture, the shapes in it from back to front, and the JPEG quality it is meant to be stored with."""

    image: Image.Image
    shapes: tuple[Shape, ...]
    quality: int


def unit_loops(label: int, rng: Generator) -> tuple[Points, ...]:
    """The outline of a class around the origin, before stretching, turning and scaling."""

    def circle(radius: float) -> Points:
        angles = np.linspace(0.0, 2 * np.pi, 72, endpoint=False)
        return radius * np.stack((np.cos(angles), np.sin(angles)), axis=1)

    name = CLASSES[label]
    if name == "circle":
        return (circle(1.0),)
    if name == "ring":
        return circle(1.0), circle(float(rng.uniform(0.48, 0.68)))
    if name == "square":
        return (np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]),)
    if name == "triangle":
        angles = np.array([-90.0, 30, 150]) + rng.uniform(-8, 8, size=3)
        return (np.stack((np.cos(np.radians(angles)), np.sin(np.radians(angles))), axis=1),)
    if name == "star":
        tips = int(rng.choice((5, 5, 6)))
        angles = np.linspace(0.0, 2 * np.pi, 2 * tips, endpoint=False)
        radii = np.where(np.arange(2 * tips) % 2 == 0, 1.0, rng.uniform(0.40, 0.50))
        return (np.stack((radii * np.cos(angles), radii * np.sin(angles)), axis=1),)
    arm = float(rng.uniform(0.24, 0.36))  # half the width of a cross's bars
    quarter = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])  # (x, y) @ turn = (-y, x): the next quarter
    return (np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)]),)


def place_shape(label: int, size: float, centre_xy: tuple[float, float], rng: Generator) -> Shape:
    """A stretched and turned shape whose box has the longer side ``size`` and the given centre, in pixels."""
    loops = unit_loops(label, rng)
    angle = rng.uniform(0, 2 * np.pi) if rng.random() < 0.75 else rng.uniform(-0.15, 0.15)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    stretch = np.array([1.0, rng.uniform(0.82, 1.0)])
    loops = tuple((loop * stretch) @ turn for loop in loops)
    low, high = loops[0].min(axis=0), loops[0].max(axis=0)
    scale = size / (high - low).max()
    return Shape(label, tuple((loop - (low + high) / 2) * scale + np.array(centre_xy) for loop in loops))


def draw_mask(loops: tuple[Points, ...], window: tuple[int, int, int, int]) -> Image.Image:
    """How much of each pixel of ``window`` (x0, y0, x1, y1) the loops cover, as 0 to 255."""
    x0, y0, x1, y1 = window
    factor = 4 if max(x1 - x0, y1 - y0) < 80 else 2
    mask = Image.new("L", ((x1 - x0) * factor, (y1 - y0) * factor))
    draw = ImageDraw.Draw(mask)
    for loop, value in zip(loops, (255, 0), strict=False):
        draw.polygon([(float(x), float(y)) for x, y in (loop - (x0, y0)) * factor], fill=value)
    return mask.reduce(factor)


def coverage(loops: tuple[Points, ...], window: tuple[int, int, int, int]) -> Floats:
    """The same as numbers in [0,1]: (y1-y0, x1-x0)."""
    return np.asarray(draw_mask(loops, window), dtype=np.float32) / np.float32(255)


def window_around(shape: Shape, margin: int) -> tuple[int, int, int, int]:
    """Whole pixels (x0, y0, x1, y1) around a shape, not clipped to the picture."""
    low = np.floor(shape.loops[0].min(axis=0)).astype(int) - margin
    high = np.ceil(shape.loops[0].max(axis=0)).astype(int) + margin
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def random_colour(rng: Generator) -> Floats:
    """Any hue, from dull to vivid, from dark to bright: three values in [0,255]."""
    saturation = rng.uniform(0.35, 1.0) if rng.random() < 0.88 else rng.uniform(0.0, 0.1)
    return np.array(colorsys.hsv_to_rgb(rng.random(), saturation, rng.uniform(0.3, 1.0)), dtype=np.float32) * 255


def smooth_noise(width: int, height: int, cells: int, channels: int, rng: Generator) -> Floats:
    """Noise (height, width, channels) in about [-1,1] whose blobs are 1/``cells`` of the picture."""
    rows, columns = max(2, cells * height // max(width, height)), max(2, cells * width // max(width, height))
    layers = [
        Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32)).resize(
            (width, height), Image.Resampling.BICUBIC if cells < 40 else Image.Resampling.BILINEAR
        )
        for _ in range(channels)
    ]
    return np.stack([np.asarray(layer) for layer in layers], axis=-1)


def ramp(width: int, height: int, angle: float) -> Floats:
    """Pixels (height, width) travelled from the upper left corner in the direction ``angle``."""
    along_x = np.arange(width, dtype=np.float32) * np.float32(np.cos(angle))
    return along_x + np.arange(height, dtype=np.float32)[:, None] * np.float32(np.sin(angle))


def paint_background(width: int, height: int, rng: Generator) -> Floats:
    """A gradient with noise of several scales, sometimes stripes: (height, width, 3) in [0,255].

    Painted at half the size, which is a quarter of the work, and enlarged: nothing in it is finer than that.
    """
    full, width, height = (width, height), (width + 1) // 2, (height + 1) // 2
    along = ramp(width, height, rng.uniform(0, 2 * np.pi))
    along = ((along - along.min()) / np.ptp(along))[..., None]
    first = random_colour(rng)
    second = random_colour(rng) if rng.random() < 0.5 else np.clip(first + rng.uniform(-70, 70), 0, 255)
    mute = rng.uniform(0.0, 0.75)  # most backgrounds are greyer than the objects
    first, second = (mute * c.mean() + (1 - mute) * c for c in (first, second))
    canvas = first + (second - first) * along
    for cells, most in ((4, 38), (12, 28), (45, 20)):
        if rng.random() < 0.75:
            tinted = 3 if cells == 4 else 1
            canvas += rng.uniform(4, most) * smooth_noise(width, height, cells, tinted, rng)
    if rng.random() < 0.35:
        wave = np.sin(ramp(width, height, rng.uniform(0, np.pi)) * (2 * np.pi / rng.uniform(3, 20)))
        if rng.random() < 0.4:
            wave = np.sign(wave)
        canvas += wave[..., None] * rng.uniform(4, 16, 3).astype(np.float32)
    half = Image.fromarray(np.clip(canvas, 0, 255, out=canvas).astype(np.uint8))
    return np.array(half.resize(full, Image.Resampling.BICUBIC), dtype=np.float32)


def paint_clutter(canvas: Floats, rng: Generator) -> None:
    """Draw lines, arcs and specks that are no objects onto ``canvas``, in place."""
    height, width = canvas.shape[:2]
    mask = Image.new("L", (2 * width, 2 * height))  # at twice the size, for smooth edges
    layer = Image.new("RGB", (width, height))  # colours, wider than the mask shows
    on_mask, on_layer = ImageDraw.Draw(mask), ImageDraw.Draw(layer)

    def anywhere() -> tuple[float, float]:
        return float(rng.uniform(-0.05, 1.05) * width), float(rng.uniform(-0.05, 1.05) * height)

    def around(centre: tuple[float, float], radius: float, scale: float) -> tuple[float, float, float, float]:
        (x, y), r = centre, radius
        return scale * (x - r), scale * (y - r), scale * (x + r), scale * (y + r)

    for _ in range(int(rng.integers(0, 7))):
        colour = tuple(int(c) for c in random_colour(rng))
        strength, thickness = int(rng.uniform(90, 230)), int(rng.integers(2, 7))
        if rng.random() < 0.7:
            start, end = anywhere(), anywhere()
            on_mask.line([(2 * x, 2 * y) for x, y in (start, end)], fill=strength, width=thickness)
            on_layer.line([start, end], fill=colour, width=thickness // 2 + 4)
        else:
            centre, radius = anywhere(), float(rng.uniform(0.15, 0.6) * max(width, height))
            first = float(rng.uniform(0, 360))
            last = first + float(rng.uniform(30, 120))
            on_mask.arc(around(centre, radius, 2), first, last, fill=strength, width=thickness)
            on_layer.arc(around(centre, radius + 2, 1), first, last, fill=colour, width=thickness // 2 + 5)
    for _ in range(int(rng.integers(0, 25))):
        centre, radius = anywhere(), float(rng.uniform(0.5, 1.3))
        on_mask.ellipse(around(centre, radius, 2), fill=200)
        on_layer.ellipse(around(centre, radius + 2, 1), fill=tuple(int(c) for c in random_colour(rng)))
    alpha = np.asarray(mask.reduce(2), dtype=np.float32)[..., None] / 255
    canvas += alpha * (np.asarray(layer, dtype=np.float32) - canvas)


def add_pixel_noise(canvas: Floats, strength: float, rng: Generator) -> None:
    """Add normal noise to ``canvas``, in place; the channels share one row of numbers, far apart."""
    pixels, apart = canvas.shape[0] * canvas.shape[1], 7919
    noise = rng.standard_normal(pixels + 2 * apart, dtype=np.float32) * np.float32(strength)
    for channel in range(3):
        canvas[..., channel] += noise[channel * apart :][:pixels].reshape(canvas.shape[:2])


def contrasting_colour(under: Floats, rng: Generator) -> Floats:
    """A colour that stands out, sometimes clearly and sometimes barely, from the mean colour ``under`` it."""
    wanted = rng.uniform(60, 130)
    best = random_colour(rng)
    for _ in range(8):
        if np.linalg.norm(best - under) >= wanted:
            break
        candidate = random_colour(rng)
        if np.linalg.norm(candidate - under) > np.linalg.norm(best - under):
            best = candidate
    return best


def paint_shape(canvas: Floats, shape: Shape, size: float, rng: Generator) -> None:
    """Draw one shape onto ``canvas``, in place: a shadow now and then, a plain or shaded fill, perhaps an outline."""
    height, width = canvas.shape[:2]
    margin = 1 + int(0.12 * size)
    window = window_around(shape, margin)
    x0, y0, x1, y1 = window
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    inside = (slice(top - y0, bottom - y0), slice(left - x0, right - x0))
    patch = canvas[top:bottom, left:right]
    alpha = coverage(shape.loops, window)

    if size >= 20 and rng.random() < 0.25:
        shift = rng.uniform(-0.08, 0.08, 2) * size
        moved = tuple(loop + shift for loop in shape.loops)
        blurred = np.asarray(draw_mask(moved, window).filter(ImageFilter.BoxBlur(0.03 * size)), dtype=np.float32)
        patch *= 1 - blurred[inside][..., None] / 255 * rng.uniform(0.25, 0.5)

    weight = alpha[inside][..., None]
    colour = contrasting_colour((patch * weight).sum(axis=(0, 1)) / max(float(weight.sum()), 1e-3), rng)
    fill: Floats = colour
    if rng.random() < 0.5:
        y = np.linspace(-1, 1, y1 - y0, dtype=np.float32)[inside[0], None]
        x = np.linspace(-1, 1, x1 - x0, dtype=np.float32)[inside[1]]
        angle = rng.uniform(0, 2 * np.pi)
        towards_x, towards_y = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        if rng.random() < 0.6:
            shade = x * towards_x + y * towards_y
        else:
            shade = 0.8 - np.hypot(x - 0.4 * towards_x, y - 0.4 * towards_y)
        fill = (colour + rng.uniform(25, 60) * shade[..., None]).astype(np.float32)
    if size >= 16 and rng.random() < 0.35:
        border = rng.uniform(0.08, 0.22)
        inner = tuple(
            (loop - mean) * scale + mean
            for loop, mean, scale in zip(
                shape.loops, (shape.loops[0].mean(axis=0),) * 2, (1 - border, 1 + border), strict=False
            )
        )
        is_fill = coverage(inner, window)[inside][..., None]
        edge = colour * 0.35 if rng.random() < 0.6 else 255 - (255 - colour) * 0.35
        fill = (is_fill * fill + (1 - is_fill) * edge).astype(np.float32)
    patch += weight * (np.clip(fill, 0, 255) - patch)


class Layers:
    """Which object is foremost at each pixel, so that no object hides too much of another."""

    def __init__(self, width: int, height: int) -> None:
        self.owner = np.full((height, width), -1, dtype=np.int16)
        self.areas = np.zeros(0, dtype=np.int64)  # pixels of each object
        self.seen = np.zeros(0, dtype=np.int64)  # pixels of each object nothing hides

    def add(self, shape: Shape) -> bool:
        """Put ``shape`` in front of all others, or return False: too much lies outside, or it hides too much."""
        height, width = self.owner.shape
        x0, y0, x1, y1 = window_around(shape, 0)
        mask = np.asarray(draw_mask(shape.loops, (x0, y0, x1, y1))) > 127
        left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        inside = mask[top - y0 : bottom - y0, left - x0 : right - x0]
        area = int(inside.sum())
        if area < (1 - MOST_OUTSIDE) * mask.sum():
            return False
        patch = self.owner[top:bottom, left:right]
        seen = self.seen - np.bincount(patch[inside] + 1, minlength=len(self.areas) + 1)[1:]
        if (seen < (1 - MOST_HIDDEN) * self.areas).any():
            return False
        patch[inside] = len(self.areas)
        self.areas, self.seen = np.append(self.areas, area), np.append(seen, area)
        return True


def make_scene(seed: int, index: int, scale: int = 1) -> Scene:
    """The scene number ``index`` of ``seed``; the same numbers give the same scene.

    One of ``scale`` N is N times as wide and high and holds N times N times as many objects.
    """
    rng = np.random.default_rng((seed, index))
    long_side = scale * int(rng.integers(288, 385))
    short_side = round(long_side / float(rng.choice((1.0, 1.2, 4 / 3, 4 / 3, 1.5))))
    width, height = (long_side, short_side) if rng.random() < 0.65 else (short_side, long_side)
    canvas = paint_background(width, height, rng)
    if rng.random() < 0.7:
        paint_clutter(canvas, rng)

    largest = min(width, height) / 2
    sizes = [
        rng.uniform(SMALLEST_PX, SMALL_PX)
        if rng.random() < SMALL_SHARE
        else SMALL_PX * (largest / SMALL_PX) ** rng.random()
        for _ in range(scale**2 * int(rng.integers(3, 15)))
    ]
    # Mostly the large ones at the back, so that small ones stay visible, but not always.
    sizes.sort(key=lambda size: -size * rng.uniform(0.5, 2.0))
    layers = Layers(width, height)
    shapes: list[Shape] = []
    for size in sizes:
        label = int(rng.integers(len(CLASSES)))
        for _ in range(12):
            low = 0.42 * size  # a little beyond the edge now and then
            centre = (float(rng.uniform(low, width - low)), float(rng.uniform(low, height - low)))
            shape = place_shape(label, float(size), centre, rng)
            if layers.add(shape):
                paint_shape(canvas, shape, float(size), rng)
                shapes.append(shape)
                break

    canvas *= 1 + rng.uniform(0, 0.15) * smooth_noise(width, height, 3, 1, rng)  # uneven light
    add_pixel_noise(canvas, rng.uniform(1, 9), rng)
    image = Image.fromarray(np.clip(canvas, 0, 255, out=canvas).astype(np.uint8))
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.BoxBlur(float(rng.uniform(0.2, 0.7))))
    return Scene(image, tuple(shapes), quality=int(rng.integers(75, 95)))


def write_dataset(out: Path, count: int, seed: int, split: str, scale: int = 1) -> Path:
    """Write ``count`` scenes under ``out`` and return the path of their COCO annotations."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in range(1, count + 1):
        scene = make_scene(seed, index, scale)
        name = f"scene-{seed}-{index:05d}.jpg"
        scene.image.save(out / "images" / name, quality=scene.quality)
        images.append({"id": index, "file_name": name, "width": scene.image.width, "height": scene.image.height})
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box_xyxy(*scene.image.size)
            box = [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": shape.label + 1,
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                }
            )
    path = out / "annotations" / f"{split}.json"
    document = {
        "info": {"description": f"{count} synthetic scenes of seed {seed}", "version": "1"},
        "licenses": [],
        "images": images,
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES, start=1)],
        "annotations": annotations,
    }
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, write the data set, say where it is."""
    parser = argparse.ArgumentParser(description="Write synthetic scenes with exact boxes as a COCO data set.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write images/ and annotations/ into")
    parser.add_argument("--count", type=int, default=100, help="how many scenes (default 100)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other scenes (default 1)")
    parser.add_argument("--split", default="val", help="name of the annotation file (default val)")
    parser.add_argument(
        "--scale", type=int, default=1, help="4: scenes of four times the sides, with 16 times the objects"
    )
    options = parser.parse_args(arguments)
    if options.count < 1 or options.seed < 0 or options.scale < 1:
        parser.error("--count and --scale must be at least 1 and --seed at least 0")
    print(write_dataset(options.out, options.count, options.seed, options.split, options.scale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
