"""Training pictures: flips, sizes, crops and colours, applied to a picture and its boxes together.

# T objects of one image
``paper`` is the authors' augmentation with every length scaled by image_size/800. ``jitter`` is for training from
scratch on few pictures: one random scale and place on a fixed canvas (large-scale jitter, arXiv:2012.07177) and
colours; a fixed canvas also spares the CPU's convolution kernels from being built anew for every batch.
``top-down`` adds vertical flips and quarter turns, for pictures without an up: microscopes, drones, satellites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from ddetr_cli.data.pixels import network_size

AugmentName = Literal["paper", "jitter", "top-down"]
Boxes = NDArray[np.float64]  # (T,4) xyxy in pixels of the picture they travel with

PAPER_SIZES = tuple(range(480, 801, 32))
PAPER_CROP_SIZES = (400, 500, 600)
PAPER_CROP = (384, 600)
# A cropped object that keeps less than this share of its area is no longer asked for (not with ``paper``).
MIN_VISIBLE = 0.25


@dataclass(frozen=True)
class Sample:
    """A picture with its objects: boxes_xyxy_px (T,4), labels (T,) class indices."""

    image: Image.Image
    boxes_xyxy_px: Boxes
    labels: NDArray[np.int64]


def augment(sample: Sample, name: AugmentName, image_size: int, rng: np.random.Generator) -> Sample:
    """One random variation of ``sample``, at a size the network takes."""
    if name == "paper":
        return _paper(sample, image_size, rng)
    # Of the picture before it is turned: a batch of portrait and landscape frames would be half padding.
    frame_hw = network_size(*sample.image.size, image_size)
    sample = _flip(sample) if rng.random() < 0.5 else sample
    if name == "top-down":
        for _ in range(int(rng.integers(4))):
            sample = _quarter_turn(sample)
    return _colours(_jitter(sample, frame_hw, rng), rng)


def augmented_size(
    width: int, height: int, name: AugmentName, image_size: int, rng: np.random.Generator
) -> tuple[int, int]:
    """(height, width) that ``augment`` would give a picture of this size, without the picture."""
    if name == "paper":
        return _plan_paper(width, height, image_size, rng).final_hw
    return network_size(width, height, image_size)


def resize(sample: Sample, size_hw: tuple[int, int]) -> Sample:
    """The sample at (height, width), bilinear with antialiasing."""
    h, w = size_hw
    if (w, h) == sample.image.size:
        return sample
    factor = np.array([w / sample.image.width, h / sample.image.height] * 2)
    image = sample.image.resize((w, h), Image.Resampling.BILINEAR)
    return Sample(image, sample.boxes_xyxy_px * factor, sample.labels)


def crop(sample: Sample, left: int, top: int, width: int, height: int, *, min_visible: float = 0.0) -> Sample:
    """A window of the sample; objects are clipped to it, and dropped when nothing (or too little) of them is left."""
    image = sample.image.crop((left, top, left + width, top + height))
    moved = sample.boxes_xyxy_px - np.array([left, top, left, top])
    clipped = np.clip(moved, 0, np.array([width, height, width, height]))
    size = clipped[:, 2:] - clipped[:, :2]
    full = (moved[:, 2:] - moved[:, :2]).prod(1)
    keep = (size > 0).all(1) & (size.prod(1) >= min_visible * full)
    return Sample(image, clipped[keep], sample.labels[keep])


@dataclass(frozen=True)
class _PaperPlan:
    """What the authors' augmentation does to a picture of a known size: every random choice, and where they end."""

    is_flipped: bool
    before_crop_hw: tuple[int, int] | None  # None: no crop
    window: tuple[int, int, int, int]  # left, top, width, height
    final_hw: tuple[int, int]


def _plan_paper(width: int, height: int, image_size: int, rng: np.random.Generator) -> _PaperPlan:
    """The authors' pipeline (datasets/coco.py, make_coco_transforms), lengths scaled by image_size/800."""
    scale = image_size / 800
    is_flipped = rng.random() < 0.5
    before_crop_hw, window = None, (0, 0, width, height)
    if rng.random() < 0.5:
        short = round(int(rng.choice(PAPER_CROP_SIZES)) * scale)
        # No cap here: a very wide picture may grow past it for a moment, as in the authors' code.
        before_crop_hw = height, width = network_size(width, height, short, cap=1 << 30)
        low, high = (round(side * scale) for side in PAPER_CROP)
        w = int(rng.integers(min(low, width), min(width, high) + 1))
        h = int(rng.integers(min(low, height), min(height, high) + 1))
        window = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
        width, height = w, h
    short = round(int(rng.choice(PAPER_SIZES)) * scale)
    return _PaperPlan(
        is_flipped, before_crop_hw, window, network_size(width, height, short, cap=int(image_size * 1333 / 800))
    )


def _paper(sample: Sample, image_size: int, rng: np.random.Generator) -> Sample:
    plan = _plan_paper(*sample.image.size, image_size, rng)
    sample = _flip(sample) if plan.is_flipped else sample
    if plan.before_crop_hw is not None:
        sample = crop(resize(sample, plan.before_crop_hw), *plan.window)
    return resize(sample, plan.final_hw)


def _flip(sample: Sample) -> Sample:
    boxes = sample.boxes_xyxy_px[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [sample.image.width, 0, sample.image.width, 0]
    return Sample(sample.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), boxes, sample.labels)


def _quarter_turn(sample: Sample) -> Sample:
    """Counter-clockwise: (x, y) -> (y, width - x)."""
    b, width = sample.boxes_xyxy_px, sample.image.width
    boxes = np.stack((b[:, 1], width - b[:, 2], b[:, 3], width - b[:, 0]), axis=1)
    return Sample(sample.image.transpose(Image.Transpose.ROTATE_90), boxes, sample.labels)


def _jitter(sample: Sample, frame_hw: tuple[int, int], rng: np.random.Generator) -> Sample:
    """A random scale, aspect and window in a frame of the given height and width, filled up with grey."""
    frame_h, frame_w = frame_hw
    fit = min(frame_h / sample.image.height, frame_w / sample.image.width)
    scale = fit * float(np.exp(rng.uniform(np.log(0.7), np.log(1.6))))
    stretch = float(np.exp(rng.uniform(-0.1, 0.1)))
    h = max(1, round(sample.image.height * scale / stretch))
    w = max(1, round(sample.image.width * scale * stretch))
    sample = resize(sample, (h, w))
    left = int(rng.integers(min(0, w - frame_w), max(0, w - frame_w) + 1))
    top = int(rng.integers(min(0, h - frame_h), max(0, h - frame_h) + 1))
    # A negative corner places a small picture inside the frame; Pillow fills the rest with black, so paste on grey.
    window = crop(sample, max(left, 0), max(top, 0), min(w, frame_w), min(h, frame_h), min_visible=MIN_VISIBLE)
    if window.image.size == (frame_w, frame_h):
        return window
    frame = Image.new("RGB", (frame_w, frame_h), (124, 116, 104))  # the mean the network subtracts
    frame.paste(window.image, (max(-left, 0), max(-top, 0)))
    shift = np.array([max(-left, 0), max(-top, 0)] * 2)
    return Sample(frame, window.boxes_xyxy_px + shift, window.labels)


def _colours(sample: Sample, rng: np.random.Generator) -> Sample:
    image = sample.image
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(float(rng.uniform(0.7, 1.3)))
    return Sample(image, sample.boxes_xyxy_px, sample.labels)
