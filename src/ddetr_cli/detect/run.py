"""The loop of a detection run: read ahead, predict window by window, draw behind, hand results on in input order.

One bad image never stops the run. What does stop it (a full disk, a lost device) leaves no half-written file.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ddetr_cli.detect.ids import assign_image_ids
from ddetr_cli.detect.reading import STOPPED, WINDOW_BYTES, Numbered, Read, Reader, defect, picture_nbytes, windows
from ddetr_cli.detect.results import ImageResult, RunSummary, count_result
from ddetr_cli.errors import DdetrError, DeviceError
from ddetr_cli.inference.ahead import HelperPool, helper_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Executor

    from PIL import Image

    from ddetr_cli.detect.journal import Journal
    from ddetr_cli.detect.results import Sink
    from ddetr_cli.detect.selection import Selection
    from ddetr_cli.detect.sources import Input
    from ddetr_cli.inference.detections import ImageDetections
    from ddetr_cli.inference.predictor import Predictor
    from ddetr_cli.inference.preparation import Prepared

_DIED = "the program died at this picture (a crash or a kill). Leave it out, or run without --skip-failed."


def detect_images(
    inputs: Sequence[Input],
    predictor: Predictor,
    sinks: Sequence[Sink],
    *,
    selection: Selection,
    max_pixels: int,
    draft: bool = False,
    allow_truncated: bool = False,
    read_timeout: float = 0,
    workers: int | None = None,
    positions: range | None = None,
    journal: Journal | None = None,
    on_result: Callable[[ImageResult], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunSummary:
    """Run ``predictor`` over ``inputs`` and give every result to ``sinks``, then to ``on_result``, in input order.

    Of the detections those that ``selection`` keeps are results. With ``draft`` the model sees large JPEGs decoded at
    reduced size. A picture that takes longer to read than ``read_timeout`` seconds fails; 0 waits for ever.
    ``workers`` threads read and draw beside the model; None chooses. ``positions``: only these of the inputs; ids are
    those of the whole.

    What ``journal`` has finished goes to the sinks as it was, without a file and not to ``on_result``; every other
    result is added to it when the sinks have it. When ``should_stop`` says so the run ends after the images in work;
    what was not reached is recorded as failed and the sinks are finished, as they are when the device fails for good
    (DeviceError). Raises OutputError from a sink, with all sinks abandoned.
    """
    start = time.perf_counter()
    positions = range(len(inputs)) if positions is None else positions
    ids = assign_image_ids([item.name for item in inputs])
    device_error: DeviceError | None = None
    threads = workers or helper_threads(predictor.device.type)
    pool = HelperPool(threads, thread_name_prefix="ddetr")
    keeper = _Keeper(pool, sinks, on_result, inputs, ids, positions, journal)
    keeps_pictures = any(sink.render is not None for sink in sinks)
    reader = Reader(predictor, max_pixels, keeps_pictures, draft, allow_truncated, read_timeout, should_stop)
    has_suspects = journal is not None and journal.has_suspects
    on_alone = journal.note_trying if journal is not None and has_suspects else None
    try:
        try:
            if not should_stop():
                for window in windows(pool, reader, keeper.pending(), predictor, threads, on_alone):
                    for result, picture in _predict_window(window, predictor, selection):
                        keeper.take(result, picture)
                        # Nothing else may be in work beside an image that may end the process.
                        keeper.hand_on(left=0 if has_suspects else threads)
                    if should_stop():
                        break
        except DeviceError as error:
            device_error = error
        keeper.hand_on(left=0)
        keeper.end(STOPPED if device_error is None else f"not processed ({device_error})")
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
    keeper.summary.seconds = time.perf_counter() - start
    return keeper.summary


class _Keeper:
    """Has results drawn, and hands them on in their order, between those that were finished before."""

    def __init__(
        self,
        pool: Executor,
        sinks: Sequence[Sink],
        on_result: Callable[[ImageResult], None],
        inputs: Sequence[Input],
        ids: Sequence[int],
        positions: range,
        journal: Journal | None,
    ) -> None:
        self.summary = RunSummary()
        self._pool = pool
        self._sinks = sinks
        self._on_result = on_result
        self._inputs, self._ids = inputs, ids
        self._positions = positions
        self._next = positions.start  # the first that the sinks have not yet
        self._journal = journal
        self._drawn: deque[_Drawn] = deque()

    def pending(self) -> Iterator[Numbered]:
        """The inputs that are not finished."""
        culprits = self._journal.finished.culprits if self._journal is not None and self._journal.has_suspects else ()
        for position in self._positions:
            if self._journal is None or position not in self._journal.finished:
                item = self._inputs[position]
                item = replace(item, failure=_DIED) if position in culprits else item
                yield Numbered(position, item, self._ids[position])

    def take(self, result: ImageResult, picture: Image.Image | None) -> None:
        """Begin to draw the next result."""
        files: list[Future[bytes] | None] = [None] * len(self._sinks)
        if picture is None:
            self._drawn.append(_Drawn(result, files, 0))
            return
        for index, sink in enumerate(self._sinks):
            if sink.render is not None:
                files[index] = self._pool.submit(sink.render, result, picture)
        self._drawn.append(_Drawn(result, files, picture_nbytes(picture)))

    def hand_on(self, left: int) -> None:
        """Give the sinks what has been drawn; wait until at most ``left`` images, and not too large ones, are not."""
        while self._drawn and (len(self._drawn) > left or self._held() > WINDOW_BYTES or self._drawn[0].is_done()):
            drawn = self._drawn.popleft()
            self._hand_on_finished()
            for sink, file in zip(self._sinks, drawn.files, strict=True):
                sink.add(drawn.result, None if file is None else file.result())
            if not drawn.result.is_reached:
                self.summary.unfinished += 1
                self._next += 1
                continue
            if self._journal is not None:
                self._journal.add(self._next, drawn.result)
            self._next += 1
            count_result(self.summary, drawn.result)
            self._on_result(drawn.result)

    def end(self, failure: str) -> None:
        """Give the sinks the rest: what was finished before, and what was not reached, failed for this reason."""
        self._hand_on_finished()
        while self._next < self._positions.stop:
            result = ImageResult(self._inputs[self._next], self._ids[self._next], failure=failure)
            for sink in self._sinks:
                sink.add(result, None)
            self.summary.unfinished += 1
            self._next += 1
            self._hand_on_finished()

    def _hand_on_finished(self) -> None:
        """Give the sinks what an earlier run finished, up to the next that it did not."""
        while self._journal is not None and self._next in self._journal.finished:
            result = self._journal.finished.read(self._next, self._inputs[self._next])
            for sink in self._sinks:
                sink.add(result, None)
            count_result(self.summary, result)
            self.summary.resumed += 1
            self._next += 1

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


def _predict_window(
    window: Sequence[Read], predictor: Predictor, selection: Selection
) -> Iterator[tuple[ImageResult, Image.Image | None]]:
    ready = [read.prepared for read in window if read.prepared is not None]
    start = time.perf_counter()
    found = iter(_predict(ready, predictor))
    seconds = (time.perf_counter() - start) / max(1, len(ready))
    for read in window:
        if read.prepared is None:
            yield ImageResult(read.item, read.image_id, failure=read.failure, is_reached=read.is_reached), None
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
        return [defect(error)]
    return [str(outcome) if isinstance(outcome, DeviceError) else outcome for outcome in outcomes]


def _result(read: Read, found: ImageDetections, seconds: float) -> ImageResult:
    return ImageResult(
        read.item,
        read.image_id,
        read.size_wh,
        [tuple(box) for box in found.boxes_xyxy_px.tolist()],
        found.scores.tolist(),
        found.labels.tolist(),
        dropped=found.dropped,
        truncated=read.is_truncated,
        seconds=seconds,
    )
