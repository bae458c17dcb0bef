"""The loop of a detection run: read ahead, predict window by window, draw behind, hand results on in input order.

One bad image never stops the run. What does stop it (a full disk, a lost device) leaves no half-written file.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ddetr_cli.data.images import read_image, read_reduced
from ddetr_cli.detect.ids import assign_image_ids
from ddetr_cli.errors import DdetrError, DeviceError, ImageError
from ddetr_cli.inference.ahead import helper_threads, map_ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Executor

    from PIL import Image

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.selection import Selection
    from ddetr_cli.detect.sources import Input
    from ddetr_cli.inference.predictor import ImageDetections, Predictor
    from ddetr_cli.inference.preparation import Prepared

_log = logging.getLogger(__name__)

# A window is what goes to the model at once. On a GPU it holds several batches, so that images of one size find each
# other; its memory is bounded because 32 photos of 89 megapixels would fill any. As much may wait to follow it.
_BATCHES_PER_WINDOW = 4
_WINDOW_BYTES = 800_000_000


@dataclass(frozen=True)
class ImageResult:
    """One input when it is finished: its detections that were kept, or why it failed."""

    input: Input
    image_id: int
    size_wh: tuple[int, int] | None = None  # upright, None where the picture could not be read
    boxes_xyxy_px: list[tuple[float, float, float, float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # class indices
    dropped: int = 0  # detections that were not finite numbers
    failure: str | None = None
    seconds: float = 0.0  # this image's share of the model's time


class Sink(Protocol):
    """Something that keeps results. ``add`` and ``finish`` raise OutputError."""

    @property
    def render(self) -> Callable[[ImageResult, Image.Image], bytes] | None:
        """The slow part of keeping a result, without any effect; called on any thread. None for a sink without."""

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Take one result, in input order, and what ``render`` made of it; None where the image failed."""

    def finish(self) -> None:
        """Everything has been added: make it final."""

    def abandon(self) -> None:
        """The run broke off: leave no temporary file."""


@dataclass
class RunSummary:
    """How a run ended. ``classes`` counts detections by class index."""

    processed: int = 0
    failed: int = 0
    unfinished: int = 0  # not reached, because the run was stopped
    dropped: int = 0
    detections: int = 0
    classes: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


def detect_images(
    inputs: Sequence[Input],
    predictor: Predictor,
    sinks: Sequence[Sink],
    *,
    selection: Selection,
    max_pixels: int,
    draft: bool = False,
    on_result: Callable[[ImageResult], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunSummary:
    """Run ``predictor`` over ``inputs`` and give every result to ``sinks``, then to ``on_result``, in input order.

    Of the detections those that ``selection`` keeps are results. With ``draft`` large JPEGs are decoded at reduced
    size, unless a sink draws. When ``should_stop`` says so the run ends after the images in work; what was not
    reached is recorded as failed and the sinks are finished, as they are when the device fails for good
    (DeviceError). Raises OutputError from a sink, with all sinks abandoned.
    """
    start = time.perf_counter()
    ids = assign_image_ids([item.name for item in inputs])
    done = 0
    device_error: DeviceError | None = None
    threads = helper_threads(predictor.device.type)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ddetr")
    keeper = _Keeper(pool, sinks, on_result)
    keeps_pictures = any(sink.render is not None for sink in sinks)
    reader = _Reader(predictor, max_pixels, keeps_pictures=keeps_pictures, draft=draft)
    try:
        try:
            for window in _windows(pool, reader, zip(inputs, ids, strict=True), predictor):
                for result, picture in _predict_window(window, predictor, selection):
                    keeper.take(result, picture)
                    done += 1
                    keeper.hand_on(left=threads)
                if should_stop():
                    break
        except DeviceError as error:
            device_error = error
        keeper.hand_on(left=0)
        for item, image_id in zip(inputs[done:], ids[done:], strict=True):
            failure = (
                "not processed (the run was stopped)." if device_error is None else f"not processed ({device_error})"
            )
            for sink in sinks:
                sink.add(ImageResult(item, image_id, failure=failure), None)
        for sink in sinks:
            sink.finish()
    except BaseException:
        for sink in sinks:
            sink.abandon()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if device_error is not None:
        raise device_error
    keeper.summary.unfinished = len(inputs) - done
    keeper.summary.seconds = time.perf_counter() - start
    return keeper.summary


class _Keeper:
    """Has results drawn, and hands them on in their order."""

    def __init__(self, pool: Executor, sinks: Sequence[Sink], on_result: Callable[[ImageResult], None]) -> None:
        self.summary = RunSummary()
        self._pool = pool
        self._sinks = sinks
        self._on_result = on_result
        self._drawn: deque[_Drawn] = deque()

    def take(self, result: ImageResult, picture: Image.Image | None) -> None:
        """Begin to draw one result."""
        files: list[Future[bytes] | None] = [None] * len(self._sinks)
        if picture is None:
            self._drawn.append(_Drawn(result, files, 0))
            return
        for index, sink in enumerate(self._sinks):
            if sink.render is not None:
                files[index] = self._pool.submit(sink.render, result, picture)
        self._drawn.append(_Drawn(result, files, _nbytes(picture)))

    def hand_on(self, left: int) -> None:
        """Give the sinks what has been drawn; wait until at most ``left`` images, and not too large ones, are not."""
        while self._drawn and (len(self._drawn) > left or self._held() > _WINDOW_BYTES or self._drawn[0].is_done()):
            drawn = self._drawn.popleft()
            for sink, file in zip(self._sinks, drawn.files, strict=True):
                sink.add(drawn.result, None if file is None else file.result())
            _count(self.summary, drawn.result)
            self._on_result(drawn.result)

    def _held(self) -> int:
        return sum(drawn.nbytes for drawn in self._drawn)


@dataclass(frozen=True)
class _Drawn:
    """A result and, for each sink, the file being made of it; None for sinks that make none."""

    result: ImageResult
    files: list[Future[bytes] | None]
    nbytes: int  # of the picture

    def is_done(self) -> bool:
        return all(file is None or file.done() for file in self.files)


def _nbytes(picture: Image.Image) -> int:
    return 4 * picture.width * picture.height  # Pillow takes four bytes for an RGB pixel


@dataclass
class _Read:
    """One input, ready for the model or failed; the picture itself only where something draws on it."""

    item: Input
    image_id: int
    size_wh: tuple[int, int] | None = None
    prepared: Prepared | None = None
    picture: Image.Image | None = None
    failure: str | None = None

    @property
    def nbytes(self) -> int:
        """Memory it holds."""
        picture = 0 if self.picture is None else _nbytes(self.picture)
        return picture + (0 if self.prepared is None else self.prepared.pixels.nbytes)


@dataclass(frozen=True)
class _Reader:
    """Turns an input into what the model takes; called on any thread, and never raises for a bad input."""

    predictor: Predictor
    max_pixels: int
    keeps_pictures: bool
    draft: bool

    def __call__(self, numbered: tuple[Input, int]) -> _Read:
        item, image_id = numbered
        read = _Read(item, image_id, failure=item.failure)
        if item.failure is not None:
            return read
        try:
            if self.draft and not self.keeps_pictures:
                short = self.predictor.image_size
                picture, read.size_wh = read_reduced(item.path, short, max_pixels=self.max_pixels)
            else:
                picture = read_image(item.path, max_pixels=self.max_pixels)
                read.size_wh = picture.size
            read.prepared = self.predictor.prepare(picture, (read.size_wh[1], read.size_wh[0]))
            read.picture = picture if self.keeps_pictures else None
        except ImageError as error:
            # The reason alone, without the path in front: files that quote it name the path themselves.
            read.failure = str(error).removeprefix(f"{item.path}: ")
        except MemoryError:
            read.failure = "not enough memory to prepare it. Give a smaller version."
        except Exception as error:
            read.failure = _defect(error)
        return read


def _windows(
    pool: Executor, reader: _Reader, numbered: Iterable[tuple[Input, int]], predictor: Predictor
) -> Iterator[list[_Read]]:
    is_cpu = predictor.device.type == "cpu"
    threads = helper_threads(predictor.device.type)
    count = 1 if is_cpu else _BATCHES_PER_WINDOW * predictor.batch_size
    ahead = threads if is_cpu else max(threads, count)
    window: list[_Read] = []
    held = 0
    for read in map_ahead(
        pool, reader, numbered, ahead, weight=lambda finished: finished.nbytes, limit=_WINDOW_BYTES
    ):
        window.append(read)
        held += read.nbytes
        if len(window) >= count or held >= _WINDOW_BYTES:
            yield window
            window, held = [], 0
    if window:
        yield window


def _predict_window(
    window: Sequence[_Read], predictor: Predictor, selection: Selection
) -> Iterator[tuple[ImageResult, Image.Image | None]]:
    ready = [read.prepared for read in window if read.prepared is not None]
    start = time.perf_counter()
    found = iter(_predict(ready, predictor))
    seconds = (time.perf_counter() - start) / max(1, len(ready))
    for read in window:
        if read.prepared is None:
            yield ImageResult(read.item, read.image_id, failure=read.failure), None
            continue
        outcome = next(found)
        if isinstance(outcome, str):
            yield ImageResult(read.item, read.image_id, read.size_wh, failure=outcome, seconds=seconds), None
        else:
            yield _result(read, selection(outcome), seconds), read.picture


def _predict(ready: Sequence[Prepared], predictor: Predictor) -> list[ImageDetections | str]:
    """Detections of each picture, or why that one failed. Raises DeviceError when the device is lost."""
    try:
        outcomes = predictor.predict_prepared(ready)
    except DdetrError:
        raise
    except Exception as error:
        # A defect of ours that one odd picture brings out must not cost the user the other thousand.
        if len(ready) > 1:
            return [outcome for one in ready for outcome in _predict([one], predictor)]
        return [_defect(error)]
    return [str(outcome) if isinstance(outcome, DeviceError) else outcome for outcome in outcomes]


def _defect(error: Exception) -> str:
    _log.debug("an image failed", exc_info=error)
    return f"internal error: {type(error).__name__}: {error} (a bug in ddetr). Please report it."


def _result(read: _Read, found: ImageDetections, seconds: float) -> ImageResult:
    return ImageResult(
        read.item,
        read.image_id,
        read.size_wh,
        [tuple(box) for box in found.boxes_xyxy_px.tolist()],
        found.scores.tolist(),
        found.labels.tolist(),
        dropped=found.dropped,
        seconds=seconds,
    )


def _count(summary: RunSummary, result: ImageResult) -> None:
    if result.failure is not None:
        summary.failed += 1
        return
    summary.processed += 1
    summary.dropped += result.dropped
    summary.detections += len(result.labels)
    for label in result.labels:
        summary.classes[label] = summary.classes.get(label, 0) + 1


def class_counts(summary: RunSummary, classes: ClassTable) -> list[tuple[str, int]]:
    """(name, detections) of every class that was found, the most frequent first."""
    pairs = [(classes.name(label), count) for label, count in summary.classes.items()]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
