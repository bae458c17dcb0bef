"""Pictures to detections with one loaded model: batches of equal size, precision, memory.

# N kept detections of one image, B batch, h and w network size

``Predictor.prepare`` turns a picture into pixels and may run on any thread; what follows it runs on one. Images are
never padded together, because padding changes results: only images of identical network size share a batch. On the
CPU every image runs alone, so its result is bit-identical whatever its neighbours.
"""

from __future__ import annotations

import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ddetr_cli.errors import DeviceError, UsageError
from ddetr_cli.inference.ahead import helper_threads, map_ahead
from ddetr_cli.inference.batching import measured_batch_size
from ddetr_cli.inference.detections import ImageDetections, finite
from ddetr_cli.inference.device import resolve_device
from ddetr_cli.inference.fast import accelerate, best_precision
from ddetr_cli.inference.graphs import MOST_GRAPHS, accelerate_on_gpu
from ddetr_cli.inference.preparation import Preparation, Prepared, Preprocess
from ddetr_cli.model.postprocess import decode
from ddetr_cli.presets import LARGEST_IMAGE_SIZE, SMALLEST_IMAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.inference.tiles import Tiling, View
    from ddetr_cli.model.detector import DetectorOutput
    from ddetr_cli.model.faster_rcnn import SuppressedOutput
    from ddetr_cli.presets import ModelConfig

_DEVICE_FAILURE = re.compile(r"(CUDA|cuDNN|HIP) error: ")
# As cuBLAS and cuDNN, the driver, and the allocator of the CPU say it.
_OUT_OF_MEMORY = ("_ALLOC_FAILED", "error: out of memory", "can't allocate memory")
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Weighted(Protocol):
    """A model with its configuration and classes: ``weights.LoadedModel``, or one that is being trained."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def classes(self) -> ClassTable: ...


class Predictor:
    """A model on a device, ready for pictures. ``loaded.model`` itself is moved to the device.

    ``precision`` auto is fp32, or bf16 on a CPU that is faster in it (``fast.best_precision``). On a CPU a model
    that ``fast.accelerate`` takes runs there, with its weights as they are now; elsewhere bf16 and fp16 run under
    autocast. Scores and boxes are always computed in fp32. ``image_size`` is the short side the model sees, its own
    by default; the long side is capped at 1333/800 of it, by the size rule of the authors or, with ``preprocess``
    "hf", of transformers. With ``tiles`` large pictures are looked at in parts as well. ``batch_size`` bounds what
    shares one run on a GPU, "auto" by what a picture takes of its memory; running out of that halves it, which is
    reported to ``on_notice`` once. Raises UsageError and DeviceError.
    """

    def __init__(
        self,
        loaded: Weighted,
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        image_size: int | None = None,
        preprocess: Preprocess = "original",
        tiles: Tiling | None = None,
        batch_size: int | Literal["auto"] = 8,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        if precision not in ("auto", "fp32", *_AUTOCAST_DTYPES):
            raise UsageError(f"precision {precision!r}: unknown. Choose auto, fp32, bf16 or fp16.")
        if batch_size != "auto" and batch_size < 1:
            raise UsageError(f"batch size {batch_size}: too small. Give at least 1.")
        if image_size is not None and not SMALLEST_IMAGE_SIZE <= image_size <= LARGEST_IMAGE_SIZE:
            raise UsageError(
                f"image size {image_size}: out of range. Give {SMALLEST_IMAGE_SIZE} to {LARGEST_IMAGE_SIZE} pixels."
            )
        self.device = device if isinstance(device, torch.device) else resolve_device(device, on_notice=on_notice)
        self.image_size = loaded.config.image_size if image_size is None else image_size
        self.prepare = Preparation(loaded.config.family, self.image_size, preprocess, tiles)
        self.classes = loaded.classes
        self._family = loaded.config.family
        self._model = loaded.model.eval().to(self.device)
        on_cpu = self.device.type == "cpu"
        if precision == "auto":
            precision = best_precision(self._model) if on_cpu else "fp32"
        self.precision = precision
        self.fast = accelerate(self._model, precision) if on_cpu else accelerate_on_gpu(self._model, precision)
        self._on_notice = on_notice
        self._has_told_of_memory = False
        self.batch_size = 1
        if not on_cpu:
            self.batch_size = self._measured_batch_size() if batch_size == "auto" else batch_size

    def predict(self, images: Sequence[Image.Image]) -> list[ImageDetections]:
        """Detections of upright RGB pictures of any sizes, in their order. Raises DeviceError."""
        found = []
        for result in self.predict_each(images):
            if isinstance(result, DeviceError):
                raise result
            found.append(result)
        return found

    def predict_each(self, images: Sequence[Image.Image]) -> list[ImageDetections | DeviceError]:
        """As ``predict``, but an image that does not fit into memory even alone yields the error in its place."""
        return self.predict_prepared([self.prepare(image) for image in images])

    def predict_prepared(self, images: Sequence[Prepared]) -> list[ImageDetections | DeviceError]:
        """As ``predict_each``, of pictures that went through ``prepare``."""
        single = iter(self._predict_single([image for image in images if image.whole is None]))
        return [next(single) if image.whole is None else self._predict_tiles(image) for image in images]

    def _predict_tiles(self, picture: Prepared) -> ImageDetections | DeviceError:
        """Detections of a picture that goes in tiles; of these only a few are in memory as the model sees them."""
        tiling, prepare = self.prepare.tiles, replace(self.prepare, tiles=None)
        assert tiling is not None
        assert picture.whole is not None
        views = tiling.views(picture.size_hw[1], picture.size_hw[0])
        pixels = picture.pixels.numpy()

        def cut(view: View) -> Prepared:
            return prepare(Image.fromarray(pixels[view.top : view.bottom, view.left : view.right]))

        threads = helper_threads(self.device.type)
        found: list[ImageDetections] = []
        with ThreadPoolExecutor(threads, thread_name_prefix="ddetr-tiles") as pool:
            tiles = map_ahead(pool, cut, views[1:], max(threads, self.batch_size))
            batch = [picture.whole]
            while batch:
                for outcome in self._predict_single(batch):
                    if isinstance(outcome, DeviceError):
                        return outcome
                    found.append(outcome)
                batch = list(islice(tiles, self.batch_size))
        return tiling.merge(views, found)

    def _predict_single(self, images: Sequence[Prepared]) -> list[ImageDetections | DeviceError]:
        groups: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(image.pixels.shape, []).append(index)
        results: dict[int, ImageDetections | DeviceError] = {}
        for (_, *size_hw), members in groups.items():
            pending = deque(members)
            while pending:
                chunk = list(islice(pending, self.batch_size))
                found = self._try_batch([images[index] for index in chunk])
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

    def _try_batch(self, images: list[Prepared]) -> list[ImageDetections] | None:
        """Detections of images of one network size, or None when memory ran out."""
        try:
            return self._run_batch(images)
        except (torch.OutOfMemoryError, MemoryError):
            pass
        except RuntimeError as error:
            # cuBLAS and cuDNN fail with a plain RuntimeError, for lack of memory too.
            is_memory = any(sign in str(error) for sign in _OUT_OF_MEMORY)
            if not is_memory and (isinstance(error, torch.AcceleratorError) or _DEVICE_FAILURE.match(str(error))):
                # An illegal access poisons the context: every later call on the device would fail too.
                why = str(error).strip().splitlines()[0]
                raise DeviceError(f"device {self.device}: failed ({why}). Run again, or use --device cpu.") from error
            if not is_memory:
                raise
        # Outside the except clauses: the exception's traceback would keep the failed run's tensors alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> DetectorOutput | SuppressedOutput:
        """What the model says of normalised pixels (B,3,h,w) without padding, in the precision and on the device."""
        if self.device.type == "cuda" and pixels.device.type == "cpu":
            pixels = pixels.pin_memory()  # the copy then runs beside the device's work
        pixels = pixels.to(self.device, non_blocking=True)
        if self.fast is not None:
            return self.fast(pixels)
        with self._autocast():
            out: DetectorOutput | SuppressedOutput = self._model(pixels, None)
        return out

    @property
    def tolerates_draft(self) -> bool:
        """Whether the arithmetic moves results too: JPEGs decoded at reduced size do, up to twice as far as bf16."""
        return self.precision != "fp32"

    @torch.inference_mode()
    def _run_batch(self, images: list[Prepared]) -> list[ImageDetections]:
        out = self.forward(torch.stack([image.pixels for image in images]))
        rows = decode(self._family, out, [image.size_hw for image in images])
        return [finite(row.boxes_xyxy_px, row.scores, row.labels) for row in rows]

    def _measured_batch_size(self) -> int:
        """As many pictures of the largest size as fit beside the graphs that will be kept."""
        size_hw = self.image_size, self.image_size * 1333 // 800
        picture = Prepared(torch.zeros(3, *size_hw), size_hw)
        runs_kept = 0 if self.fast is None else MOST_GRAPHS
        return measured_batch_size(lambda: self._try_batch([picture]) is not None, self.device, runs_kept=runs_kept)

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

    def _out_of_memory(self, size_hw: Sequence[int]) -> DeviceError:
        free = ""
        if self.device.type == "cuda":
            free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
            free = f", {free_bytes >> 20} of {total_bytes >> 20} MiB free"
        return DeviceError(
            f"device {self.device}: out of memory (one image at {size_hw[1]}x{size_hw[0]}{free}). "
            "Use a smaller --image-size, or --device cpu."
        )
