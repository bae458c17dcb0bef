"""The loop of a detection run: decode ahead, predict window by window, hand every result on in input order.

One bad image never stops the run. What does stop it (a full disk, a lost device) leaves no half-written file.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from ddetr_cli.data.images import read_image
from ddetr_cli.detect.ids import assign_image_ids
from ddetr_cli.errors import DdetrError, DeviceError, ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from PIL import Image

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.sources import Input
    from ddetr_cli.inference.predictor import ImageDetections, Predictor

_log = logging.getLogger(__name__)

DECODERS = 2  # threads; Pillow lets go of the interpreter while it decodes
# A window is what may wait for the model at once. On a GPU it holds several batches, so that images of one size
# find each other; its pixels are bounded because 32 photos of 89 megapixels would fill any memory.
_BATCHES_PER_WINDOW = 4
_WINDOW_PIXELS = 200_000_000


@dataclass(frozen=True)
class ImageResult:
    """One input when it is finished: its detections above the threshold, or why it failed."""

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
    """Something that keeps results. Its methods raise OutputError."""

    def add(self, result: ImageResult, picture: Image.Image | None) -> None:
        """Take one result, in input order; ``picture`` is None where the image failed."""

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
    threshold: float,
    max_pixels: int,
    on_result: Callable[[ImageResult], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunSummary:
    """Run ``predictor`` over ``inputs`` and give every result to ``sinks``, then to ``on_result``, in input order.

    Detections scoring ``threshold`` or more are kept. When ``should_stop`` says so the run ends after the images
    in work; what was not reached is recorded as failed and the sinks are finished, as they are when the device
    fails for good (DeviceError). Raises OutputError from a sink, with all sinks abandoned.
    """
    summary = RunSummary()
    start = time.perf_counter()
    ids = assign_image_ids([item.name for item in inputs])
    done = 0
    device_error: DeviceError | None = None

    def keep(result: ImageResult, picture: Image.Image | None) -> None:
        for sink in sinks:
            sink.add(result, picture)
        _count(summary, result)
        on_result(result)

    try:
        try:
            for window in _windows(inputs, ids, predictor, max_pixels):
                for result, picture in _predict_window(window, predictor, threshold):
                    keep(result, picture)
                    done += 1
                if should_stop():
                    break
        except DeviceError as error:
            device_error = error
        for item, image_id in zip(inputs[done:], ids[done:], strict=True):
            failure = (
                "not processed (the run was stopped)." if device_error is None else f"not processed ({device_error})"
            )
            for sink in sinks:
                sink.add(ImageResult(item, image_id, failure=failure), None)
            summary.unfinished += 1
        for sink in sinks:
            sink.finish()
    except BaseException:
        for sink in sinks:
            sink.abandon()
        raise
    if device_error is not None:
        raise device_error
    summary.seconds = time.perf_counter() - start
    return summary


@dataclass
class _Decoded:
    item: Input
    image_id: int
    picture: Image.Image | None
    failure: str | None


def _failure_of(path: Path, error: ImageError) -> str:
    """The reason alone, without the path in front: files that quote it name the path themselves."""
    return str(error).removeprefix(f"{path}: ")


def _decode(item: Input, image_id: int, max_pixels: int) -> _Decoded:
    if item.failure is not None:
        return _Decoded(item, image_id, None, item.failure)
    try:
        return _Decoded(item, image_id, read_image(item.path, max_pixels=max_pixels), None)
    except ImageError as error:
        return _Decoded(item, image_id, None, _failure_of(item.path, error))


def _decode_ahead(inputs: Sequence[Input], ids: Sequence[int], max_pixels: int, ahead: int) -> Iterator[_Decoded]:
    """Every input decoded, in order, with at most ``ahead`` pictures finished or in work beyond the one given."""
    work = iter(zip(inputs, ids, strict=True))
    with ThreadPoolExecutor(DECODERS, thread_name_prefix="ddetr-decode") as pool:
        waiting: deque[Future[_Decoded]] = deque()
        try:
            for item, image_id in islice(work, ahead):
                waiting.append(pool.submit(_decode, item, image_id, max_pixels))
            while waiting:
                decoded = waiting.popleft().result()
                following = next(work, None)
                if following is not None:
                    waiting.append(pool.submit(_decode, *following, max_pixels))
                yield decoded
        finally:
            for future in waiting:
                future.cancel()


def _windows(
    inputs: Sequence[Input], ids: Sequence[int], predictor: Predictor, max_pixels: int
) -> Iterator[list[_Decoded]]:
    count = 1 if predictor.device.type == "cpu" else _BATCHES_PER_WINDOW * predictor.batch_size
    window: list[_Decoded] = []
    pixels = 0
    for decoded in _decode_ahead(inputs, ids, max_pixels, ahead=DECODERS):
        window.append(decoded)
        if decoded.picture is not None:
            pixels += decoded.picture.width * decoded.picture.height
        if len(window) >= count or pixels >= _WINDOW_PIXELS:
            yield window
            window, pixels = [], 0
    if window:
        yield window


def _predict_window(
    window: Sequence[_Decoded], predictor: Predictor, threshold: float
) -> list[tuple[ImageResult, Image.Image | None]]:
    pictures = [decoded.picture for decoded in window if decoded.picture is not None]
    start = time.perf_counter()
    found = iter(_predict(pictures, predictor))
    seconds = (time.perf_counter() - start) / max(1, len(pictures))
    results: list[tuple[ImageResult, Image.Image | None]] = []
    for decoded in window:
        if decoded.picture is None:
            results.append((ImageResult(decoded.item, decoded.image_id, failure=decoded.failure), None))
            continue
        outcome = next(found)
        if isinstance(outcome, str):
            failed = ImageResult(
                decoded.item, decoded.image_id, decoded.picture.size, failure=outcome, seconds=seconds
            )
            results.append((failed, None))
        else:
            results.append((_result(decoded, decoded.picture.size, outcome, threshold, seconds), decoded.picture))
    return results


def _predict(pictures: Sequence[Image.Image], predictor: Predictor) -> list[ImageDetections | str]:
    """Detections of each picture, or why that one failed. Raises DeviceError when the device is lost."""
    try:
        outcomes = predictor.predict_each(pictures)
    except DdetrError:
        raise
    except Exception as error:
        # A defect of ours that one odd picture brings out must not cost the user the other thousand.
        if len(pictures) > 1:
            return [outcome for picture in pictures for outcome in _predict([picture], predictor)]
        _log.debug("prediction failed", exc_info=True)
        return [f"internal error: {type(error).__name__}: {error} (a bug in ddetr). Please report it."]
    return [str(outcome) if isinstance(outcome, DeviceError) else outcome for outcome in outcomes]


def _result(
    decoded: _Decoded, size_wh: tuple[int, int], found: ImageDetections, threshold: float, seconds: float
) -> ImageResult:
    is_kept = found.scores >= threshold
    return ImageResult(
        decoded.item,
        decoded.image_id,
        size_wh,
        [tuple(box) for box in found.boxes_xyxy_px[is_kept].tolist()],
        found.scores[is_kept].tolist(),
        found.labels[is_kept].tolist(),
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
