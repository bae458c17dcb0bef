"""The library: a model that finds objects in pictures, with the numbers of ``ddetr detect``."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from ddetr_cli.data.formats import MAX_PIXELS
from ddetr_cli.data.images import open_picture, read_picture
from ddetr_cli.errors import DeviceError, UsageError
from ddetr_cli.inference.ahead import helper_threads, map_ahead
from ddetr_cli.inference.device import resolve_device
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.inference.results import Box, Detection, Detections
from ddetr_cli.inference.suppression import check_nms, rows_without_overlaps
from ddetr_cli.inference.tiles import DEFAULT_OVERLAP, Tiling
from ddetr_cli.weights import load_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ddetr_cli.data.images import ImageLike
    from ddetr_cli.inference.detections import ImageDetections
    from ddetr_cli.inference.preparation import Prepared, Preprocess

_log = logging.getLogger(__name__)


class Detector:
    """A model ready to find objects: ``Detector("r50").detect("street.jpg")``.

    ``model`` is what ``ddetr detect --model`` takes: a checkpoint file or training run, ``demo``, a preset, a hub id.
    The other arguments have the names, values and defaults of its options. It may be used from several threads, which
    take turns. Raises UsageError, CheckpointError and DeviceError, all of them DdetrError. What a user might want to
    know of the file (a checksum it lacks, a guess at its variant) goes to the log, at INFO.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "r50",
        *,
        device: str = "auto",
        precision: str = "auto",
        image_size: int | None = None,
        preprocess: Preprocess = "original",
        threshold: float = 0.5,
        nms: float | None = None,
        batch_size: int | Literal["auto"] = "auto",
        preset: str | None = None,
        max_pixels: int = MAX_PIXELS,
        tiles: int | None = None,
        tile_overlap: float = DEFAULT_OVERLAP,
        draft: bool | None = None,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise UsageError(f"threshold {threshold}: not a score. Give a number from 0 to 1.")
        check_nms(nms)
        tiling = None if tiles is None else Tiling(tiles, tile_overlap)
        # First, because it takes an instant to refuse a device and minutes to download a model.
        resolved = resolve_device(device, on_notice=_log.warning)
        loaded = load_model(os.fspath(model), preset=preset, announce=_log.info)
        for note in loaded.report.notes:
            _log.info(note)
        self.threshold = threshold
        self.nms = nms
        self._classes = loaded.classes
        self._max_pixels = max_pixels
        self._predictor = Predictor(
            loaded,
            device=resolved,
            precision=precision,
            image_size=image_size,
            preprocess=preprocess,
            tiles=tiling,
            batch_size=batch_size,
            on_notice=_log.warning,
        )
        self._draft = self._predictor.tolerates_draft if draft is None else draft
        self._turn = threading.Lock()

    def detect(self, image: ImageLike) -> Detections:
        """What is in one picture, best first, scoring ``threshold`` or more; with ``nms`` without near-equal boxes.

        A file is turned upright as its EXIF says, and boxes are in pixels of the upright picture. A Pillow picture or
        a uint8 array (H,W,3) in RGB order is taken as it is. Raises ImageError for a picture that cannot be read,
        UsageError for what is no picture at all, DeviceError where the device fails or has too little memory.
        """
        return self._results([self._prepare(image)])[0]

    def detect_many(self, images: Iterable[ImageLike]) -> Iterator[Detections]:
        """``detect`` of each of ``images``, in order; the next ones are read while the model works.

        On a GPU images of equal size are computed together, ``batch_size`` of them. The first that cannot be read
        ends it with its error: call ``detect`` on each in turn to pass over bad ones. Raises UsageError for a single
        picture.
        """
        if isinstance(images, str | bytes | os.PathLike):
            raise UsageError(f"detect_many({os.fsdecode(images)!r}): one picture. Give a list, or call detect.")
        return self._detect_many(images)

    def _detect_many(self, images: Iterable[ImageLike]) -> Iterator[Detections]:
        threads = helper_threads(self._predictor.device.type)
        size = self._predictor.batch_size
        with ThreadPoolExecutor(threads, thread_name_prefix="ddetr") as pool:
            prepared = map_ahead(pool, self._prepare, images, max(threads, size))
            while batch := list(islice(prepared, size)):
                yield from self._results(batch)

    @property
    def categories(self) -> list[dict[str, Any]]:
        """What the model tells apart, as the ``categories`` of a COCO file: ids and names."""
        return self._classes.to_categories()

    @property
    def device(self) -> str:
        """Where it computes: ``cpu``, ``cuda:0``."""
        return str(self._predictor.device)

    @property
    def precision(self) -> str:
        """The arithmetic it computes with: ``fp32``, ``bf16`` or ``fp16``."""
        return self._predictor.precision

    @property
    def image_size(self) -> int:
        """The short side in pixels of what the model sees."""
        return self._predictor.image_size

    def _prepare(self, image: ImageLike) -> Prepared:
        prepare = self._predictor.prepare
        if isinstance(image, str | os.PathLike):
            short = prepare.reducible_to if self._draft else None
            picture = read_picture(image, short=short, max_pixels=self._max_pixels)
            return prepare(picture.image, (picture.size_wh[1], picture.size_wh[0]))
        return prepare(open_picture(image, self._max_pixels))

    def _results(self, batch: list[Prepared]) -> list[Detections]:
        with self._turn:
            outcomes = self._predictor.predict_prepared(batch)
        results = []
        for outcome, prepared in zip(outcomes, batch, strict=True):
            if isinstance(outcome, DeviceError):
                raise outcome
            results.append(self._result(outcome, prepared.size_hw))
        return results

    def _result(self, found: ImageDetections, size_hw: tuple[int, int]) -> Detections:
        is_kept = found.scores >= self.threshold
        columns = [column[is_kept] for column in (found.boxes_xyxy_px, found.scores, found.labels)]
        if self.nms is not None:
            rows = rows_without_overlaps(columns[0], columns[2], self.nms)
            columns = [column[rows] for column in columns]
        items = tuple(
            Detection(self._classes.name(index), self._classes.category_ids[index], score, Box(*box), index)
            for box, score, index in zip(*(column.tolist() for column in columns), strict=True)
        )
        return Detections(items, size_hw[1], size_hw[0], found.dropped)
