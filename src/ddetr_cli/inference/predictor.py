"""Pictures to detections with one loaded model: preparation, batches of equal size, precision, memory.

# N kept detections of one image, B batch, h and w network size

Images are never padded together, because padding changes results: only images of identical network size share a
batch. On the CPU every image runs alone, so its result is bit-identical whatever its neighbours.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ddetr_cli.data.images import network_size, pad_batch, to_pixels
from ddetr_cli.errors import DeviceError, UsageError
from ddetr_cli.inference.device import resolve_device
from ddetr_cli.model.postprocess import postprocess

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.model.detector import DeformableDetr
    from ddetr_cli.presets import ModelConfig

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Weighted(Protocol):
    """A model with its configuration and classes: ``weights.LoadedModel``, or one that is being trained."""

    @property
    def model(self) -> DeformableDetr: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def classes(self) -> ClassTable: ...


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, best first, no threshold.

    boxes_xyxy_px (N,4), scores (N,), labels (N,) class indices: CPU tensors; boxes in pixels of
    the image as given, not clipped to it. ``dropped`` rows were not finite and are not among the N.
    """

    boxes_xyxy_px: Tensor
    scores: Tensor
    labels: Tensor
    dropped: int = 0


class Predictor:
    """A model on a device, ready for pictures. ``loaded.model`` itself is moved to the device.

    ``precision`` auto is fp32 for now; bf16 and fp16 run under autocast, scores and boxes are always computed in
    fp32. ``image_size`` is the short side the model sees, its own by default; the long side is capped at 1333/800
    of it. ``batch_size`` bounds what shares one run on a GPU; running out of memory halves it, which is reported to
    ``on_notice`` once. Raises UsageError and DeviceError.
    """

    def __init__(
        self,
        loaded: Weighted,
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        image_size: int | None = None,
        batch_size: int = 8,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        if precision not in ("auto", "fp32", *_AUTOCAST_DTYPES):
            raise UsageError(f"precision {precision!r}: unknown. Choose auto, fp32, bf16 or fp16.")
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size}: too small. Give at least 1.")
        if image_size is not None and image_size < 1:
            raise UsageError(f"image size {image_size}: too small. Give at least 1 pixel.")
        self.device = device if isinstance(device, torch.device) else resolve_device(device, on_notice=on_notice)
        self.precision = "fp32" if precision == "auto" else precision
        self.image_size = loaded.config.image_size if image_size is None else image_size
        self.batch_size = 1 if self.device.type == "cpu" else batch_size
        self.classes = loaded.classes
        self._model = loaded.model.eval().to(self.device)
        self._on_notice = on_notice
        self._has_told_of_memory = False

    def predict(self, images: Sequence[Image]) -> list[ImageDetections]:
        """Detections of upright RGB pictures of any sizes, in their order. Raises DeviceError."""
        found = []
        for result in self.predict_each(images):
            if isinstance(result, DeviceError):
                raise result
            found.append(result)
        return found

    def predict_each(self, images: Sequence[Image]) -> list[ImageDetections | DeviceError]:
        """As ``predict``, but an image that does not fit into memory even alone yields the error in its place."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            size_hw = network_size(image.width, image.height, self.image_size)
            groups.setdefault(size_hw, []).append(index)
        results: dict[int, ImageDetections | DeviceError] = {}
        for size_hw, members in groups.items():
            pending = deque(members)
            while pending:
                chunk = list(islice(pending, self.batch_size))
                found = self._try_batch([images[index] for index in chunk], size_hw)
                if found is None and len(chunk) > 1:
                    self._halve(len(chunk))
                    continue
                if found is None:
                    results[chunk[0]] = self._out_of_memory(size_hw)
                else:
                    results.update(zip(chunk, found, strict=True))
                for _ in chunk:
                    pending.popleft()
        return [results[index] for index in range(len(images))]

    def _try_batch(self, images: list[Image], size_hw: tuple[int, int]) -> list[ImageDetections] | None:
        """Detections of images of one network size, or None when memory ran out."""
        try:
            return self._run_batch(images, size_hw)
        except (torch.OutOfMemoryError, MemoryError):
            pass
        except torch.AcceleratorError as error:
            # An illegal access poisons the context: every later call on the device would fail too.
            why = str(error).strip().splitlines()[0]
            raise DeviceError(f"device {self.device}: failed ({why}). Run again, or use --device cpu.") from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how the CPU allocator says it
                raise
        # Outside the except clauses: the exception's traceback would keep the failed run's tensors alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def _run_batch(self, images: list[Image], size_hw: tuple[int, int]) -> list[ImageDetections]:
        pixels, is_padding = pad_batch([to_pixels(image, size_hw) for image in images])
        with self._autocast():
            out = self._model(pixels.to(self.device), is_padding.to(self.device))
        sizes_hw = [(image.height, image.width) for image in images]
        rows = postprocess(out.logits.float().cpu(), out.boxes_cxcywh.float().cpu(), sizes_hw)
        return [_finite(row.boxes_xyxy_px, row.scores, row.labels) for row in rows]

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = _AUTOCAST_DTYPES.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _halve(self, size: int) -> None:
        self.batch_size = max(1, size // 2)
        if self._on_notice is not None and not self._has_told_of_memory:
            self._has_told_of_memory = True
            self._on_notice(
                f"device {self.device}: out of memory with a batch of {size}; going on with smaller batches."
            )

    def _out_of_memory(self, size_hw: tuple[int, int]) -> DeviceError:
        free = ""
        if self.device.type == "cuda":
            free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
            free = f", {free_bytes >> 20} of {total_bytes >> 20} MiB free"
        return DeviceError(
            f"device {self.device}: out of memory (one image at {size_hw[1]}x{size_hw[0]}{free}). "
            "Use a smaller --image-size, or --device cpu."
        )


def _finite(boxes_xyxy_px: Tensor, scores: Tensor, labels: Tensor) -> ImageDetections:
    """The rows whose score and four coordinates are finite: a NaN would count as a perfect match in pycocotools."""
    is_finite = scores.isfinite() & boxes_xyxy_px.isfinite().all(dim=1)
    dropped = len(scores) - int(is_finite.sum())
    return ImageDetections(boxes_xyxy_px[is_finite], scores[is_finite], labels[is_finite], dropped)
