"""Training samples: one picture read, varied and turned into what the network and the criterion take.

# T objects of one image, B batch
Every random choice follows from (seed, epoch, index), so that neither the number of workers nor a resumed run
changes what a sample looks like.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from ddetr_cli.boxes import xyxy_to_cxcywh
from ddetr_cli.classes import ClassTable
from ddetr_cli.data.coco import CocoAnnotations, read_dataset_image
from ddetr_cli.data.images import pad_batch, to_pixels
from ddetr_cli.errors import DatasetError, DdetrError, DeviceError, ImageError
from ddetr_cli.train.augment import AugmentName, Sample, augment
from ddetr_cli.train.matcher import Target

# Decoded pictures kept in memory, so that a small data set decodes once; not in workers, which end with the epoch.
CACHE_BYTES = 1 << 30
WINDOW = 16  # batches among which pictures of like shape are put together
# Few batch shapes instead of hundreds: convolution libraries prepare themselves anew for every shape.
PAD_MULTIPLE = 32


@dataclass(frozen=True)
class Batch:
    """pixels (B,3,H,W) normalised, is_padding (B,H,W) or None where all images have one size, one target an image."""

    pixels: Tensor
    is_padding: Tensor | None
    targets: list[Target]


class TrainingSet(Dataset[tuple[Tensor, Target]]):
    """Augmented samples of one annotation file; ``epoch`` is set by the loop before each pass."""

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
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Normalised pixels (3,H,W) and the target. Raises DatasetError."""
        rng = np.random.default_rng((self.seed, self.epoch, index))
        sample = augment(self._read(index), self.augmentation, self.image_size, rng)
        width, height = sample.image.size
        boxes = xyxy_to_cxcywh(torch.from_numpy(sample.boxes_xyxy_px)) / torch.tensor([width, height, width, height])
        return to_pixels(sample.image, (height, width)), Target(torch.from_numpy(sample.labels), boxes.float())

    def _read(self, index: int) -> Sample:
        listed = self.annotations.images[index]
        image = self._cache.get(index)
        if image is None:
            try:
                image = read_dataset_image(self.images, listed)
            except ImageError as error:
                raise DatasetError(f"{error} (image {listed.id!r} of the data set)") from error
            size = image.width * image.height * 3
            if get_worker_info() is None and self._cached_bytes + size <= CACHE_BYTES:
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


def collate(samples: list[tuple[Tensor, Target]]) -> Batch:
    """One batch of samples; of different sizes only, padded to a multiple of ``PAD_MULTIPLE``."""
    is_padded = len({image.shape for image, _ in samples}) > 1
    pixels, is_padding = pad_batch([image for image, _ in samples], multiple=PAD_MULTIPLE if is_padded else 1)
    return Batch(pixels, is_padding if is_padded else None, [target for _, target in samples])


def read_batches(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of ``loader``, with what went wrong in a worker process as one sentence.

    Raises DatasetError, and DeviceError where a worker was killed.
    """
    try:
        yield from loader
    except DdetrError as error:
        # torch puts the worker's traceback into the message; it ends with "<class>: <the message>".
        raise type(error)(str(error).rstrip().rpartition(f"{type(error).__name__}: ")[2]) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DeviceError(
            "training: a process that reads images was killed (probably out of memory). Use fewer --workers."
        ) from error


class BatchSampler(Sampler[list[int]]):
    """Batches of indices, each index once, in an order that follows from (seed, epoch).

    Pictures of like shape share a batch, chosen within a shuffled window of ``WINDOW`` batches: padding a batch of
    portraits and landscapes to one size would be a third of the work. A short last batch is left out, unless it is
    the only one.
    """

    def __init__(self, aspects: Sequence[float], batch_size: int, seed: int) -> None:
        self.aspects, self.batch_size, self.seed, self.epoch = np.asarray(aspects), batch_size, seed, 0

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.aspects))[: max(len(self) * self.batch_size, 1)]
        batches: list[list[int]] = []
        for start in range(0, len(order), WINDOW * self.batch_size):
            window = order[start : start + WINDOW * self.batch_size]
            window = window[np.argsort(self.aspects[window], kind="stable")]
            batches += [window[i : i + self.batch_size].tolist() for i in range(0, len(window), self.batch_size)]
        rng.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return max(1, len(self.aspects) // self.batch_size)
