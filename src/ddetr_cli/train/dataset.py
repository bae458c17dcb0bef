"""Training samples: one picture read, varied and turned into what the network and the criterion take.

# T objects of one image, B batch
Every random choice follows from (seed, epoch, index), so that neither the number of workers nor a resumed run
changes what a sample looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ddetr_cli.boxes import xyxy_to_cxcywh
from ddetr_cli.classes import ClassTable
from ddetr_cli.data.coco import CocoAnnotations, read_dataset_image
from ddetr_cli.data.pixels import pad_batch, to_pixels
from ddetr_cli.errors import DatasetError, ImageError, UsageError
from ddetr_cli.train.augment import AugmentName, Sample, augment, augmented_size
from ddetr_cli.train.matcher import Target

# Decoded pictures kept in memory unasked, so that a small data set decodes once; not in workers, which end with the
# epoch. ``cache_all`` keeps all of them, before there are workers.
CACHE_BYTES = 1 << 30
# Of the memory that is left, what a cache may take: the rest is for the training itself.
CACHE_SHARE = 0.7
# Few batch shapes instead of hundreds: convolution libraries prepare themselves anew for every shape.
PAD_MULTIPLE = 32
# Pictures tried in the place of one that cannot be read, before the disk is taken to be gone.
MAX_REPLACEMENTS = 20


@dataclass(frozen=True)
class Batch:
    """pixels (B,3,H,W) normalised, is_padding (B,H,W) or None where all images have one size, one target an image.

    ``unreadable``: indices of images that others had to stand in for, and why.
    """

    pixels: Tensor
    is_padding: Tensor | None
    targets: list[Target]
    unreadable: tuple[tuple[int, str], ...] = ()
    own_pixels: int = 0  # of B*H*W: those of the pictures themselves

    def to(self, device: torch.device) -> Batch:
        """The same with pixels, as convolutions like them, and padding on ``device``."""
        pixels = self.pixels.to(device, memory_format=torch.channels_last, non_blocking=True)
        is_padding = None if self.is_padding is None else self.is_padding.to(device, non_blocking=True)
        return replace(self, pixels=pixels, is_padding=is_padding)

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU copies from while the host goes on; torch's loader asks for it."""
        is_padding = None if self.is_padding is None else self.is_padding.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), is_padding=is_padding)


class TrainingSample(NamedTuple):
    """Normalised pixels (3,H,W), what is in them, and which images could not be read on the way to it."""

    pixels: Tensor
    target: Target
    unreadable: tuple[tuple[int, str], ...] = ()


class TrainingSet(Dataset[TrainingSample]):
    """Augmented samples of one annotation file; ``epoch`` is set by the loop before each pass.

    An image that vanishes or breaks while a run of days goes on is replaced by the next one that can be read.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        images: Path,
        classes: ClassTable,
        *,
        augmentation: AugmentName,
        image_size: int,
        seed: int,
    ) -> None:
        self.annotations, self.images = annotations, images
        self.index_of = classes.index_of()
        self.augmentation, self.image_size, self.seed = augmentation, image_size, seed
        self.epoch = 0
        self._cache: dict[int, Image.Image] = {}
        self._cache_limit = CACHE_BYTES
        self._cached_bytes = 0

    def cache_all(self, available: int | None) -> int:
        """Read every picture into memory, where it stays; returns the bytes they take.

        Processes forked later share that memory. Raises UsageError, before reading, where they take more than a
        share of the bytes ``available``.
        """
        size = sum(3 * image.width * image.height for image in self.annotations.images)
        if available is not None and size > CACHE_SHARE * available:
            raise UsageError(
                f"--cache: {len(self)} decoded pictures take {gigabytes(size)}, more than "
                f"{CACHE_SHARE:.0%} of the {gigabytes(available)} of memory that are free. Leave it out; more "
                "--workers help as well."
            )
        self._cache_limit = size
        for index in range(len(self)):
            with suppress(DatasetError):  # others stand in for it, as without a cache
                self._read(index)
        return self._cached_bytes

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int) -> TrainingSample:
        """One sample. Raises DatasetError where many images in a row cannot be read."""
        whole, unreadable = self._read_or_replace(index)
        sample = augment(whole, self.augmentation, self.image_size, self._choices(self.epoch, index))
        width, height = sample.image.size
        boxes = xyxy_to_cxcywh(torch.from_numpy(sample.boxes_xyxy_px)) / torch.tensor([width, height, width, height])
        target = Target(torch.from_numpy(sample.labels), boxes.float())
        return TrainingSample(to_pixels(sample.image, (height, width)), target, unreadable)

    def shapes(self, epoch: int, indices: Sequence[int]) -> NDArray[np.int64]:
        """(height, width) of these samples in ``epoch``, (N,2), from the sizes the annotations state."""
        images = self.annotations.images
        return np.array(
            [
                augmented_size(
                    images[i].width, images[i].height, self.augmentation, self.image_size, self._choices(epoch, i)
                )
                for i in indices
            ],
            dtype=np.int64,
        ).reshape(-1, 2)

    def _choices(self, epoch: int, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch, index))

    def _read_or_replace(self, index: int) -> tuple[Sample, tuple[tuple[int, str], ...]]:
        unreadable: list[tuple[int, str]] = []
        for candidate in range(index, index + min(len(self), MAX_REPLACEMENTS)):
            try:
                return self._read(candidate % len(self)), tuple(unreadable)
            except DatasetError as error:
                unreadable.append((candidate % len(self), str(error)))
        raise DatasetError(f"{unreadable[-1][1]} None of {len(unreadable)} images in a row could be read.")

    def _read(self, index: int) -> Sample:
        listed = self.annotations.images[index]
        image = self._cache.get(index)
        if image is None:
            try:
                image = read_dataset_image(self.images, listed)
            except ImageError as error:
                raise DatasetError(f"{error} (image {listed.id!r} of the data set).") from error
            size = image.width * image.height * 3
            if get_worker_info() is None and self._cached_bytes + size <= self._cache_limit:
                self._cache[index] = image
                self._cached_bytes += size
        # Crowds are regions, not objects: the authors train without them.
        objects = [a for a in self.annotations.by_image[listed.id] if not a.iscrowd]
        xywh = np.array([a.bbox_xywh for a in objects], dtype=np.float64).reshape(-1, 4)
        xyxy = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
        xyxy = np.clip(xyxy, 0, [image.width, image.height] * 2)
        labels = np.array([self.index_of[a.category_id] for a in objects], dtype=np.int64)
        keep = (xyxy[:, 2:] > xyxy[:, :2]).all(1)
        return Sample(image, xyxy[keep], labels[keep])


def collate(samples: list[TrainingSample]) -> Batch:
    """One batch of samples; of different sizes only, padded to a multiple of ``PAD_MULTIPLE``."""
    is_padded = len({sample.pixels.shape for sample in samples}) > 1
    pixels, is_padding = pad_batch([sample.pixels for sample in samples], multiple=PAD_MULTIPLE if is_padded else 1)
    unreadable = dict(pair for sample in samples for pair in sample.unreadable)
    targets = [sample.target for sample in samples]
    own_pixels = sum(sample.pixels[0].numel() for sample in samples)
    return Batch(pixels, is_padding if is_padded else None, targets, tuple(unreadable.items()), own_pixels)


def gigabytes(size: int) -> str:
    """``size`` in bytes as people say it."""
    return f"{size / 1e9:.1f} GB"
