"""Inputs to what the model takes: read and prepared on threads ahead of it, handed over in windows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ddetr_cli.data.images import Picture, picture_memory_kept, read_picture
from ddetr_cli.detect.patience import call_within
from ddetr_cli.detect.video import Frame
from ddetr_cli.errors import ImageError
from ddetr_cli.inference.ahead import map_ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Executor

    from PIL import Image

    from ddetr_cli.detect.sources import Input
    from ddetr_cli.inference.predictor import Predictor
    from ddetr_cli.inference.preparation import Prepared

_log = logging.getLogger(__name__)

# A window is what goes to the model at once. On a GPU it holds several batches, so that images of one size find each
# other; its memory is bounded because 32 photos of 89 megapixels would fill any. As much may wait to follow it.
_BATCHES_PER_WINDOW = 4
WINDOW_BYTES = 800_000_000


# Why an input failed that was not reached.
STOPPED = "not processed (the run was stopped)."


class NotReachedError(ImageError):
    """A picture that was not read to its end before the run was stopped."""


class Numbered(NamedTuple):
    """An input with its position among all of them and the id it has in the results."""

    position: int
    item: Input
    image_id: int


def read_input(
    item: Input,
    *,
    short: int | None = None,
    keeps_whole: bool = False,
    max_pixels: int,
    allow_truncated: bool = False,
    read_timeout: float = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Picture:
    """The picture of an input, wherever it comes from, as ``read_picture`` gives it. Raises ImageError.

    One that takes longer than ``read_timeout`` seconds is given up, unless that is 0; a thread stays behind with it.
    Of a video that is the time without another frame: those before the one that is asked for are decoded too.
    When ``should_stop`` says so there are only some seconds left; then it is NotReachedError that is raised.
    """

    def read() -> Picture:
        if isinstance(item.origin, Frame):
            frame = item.origin.picture(max_pixels)
            return Picture(frame, frame.size)
        return read_picture(
            item.path,
            opener=None if item.origin is None else item.origin.open,
            short=short,
            keeps_whole=keeps_whole,
            max_pixels=max_pixels,
            allow_truncated=allow_truncated,
        )

    def progress() -> int:
        return item.origin.video.decoded if isinstance(item.origin, Frame) else 0

    try:
        return call_within(read_timeout, read, should_stop=should_stop, progress=progress)
    except TimeoutError as error:
        if should_stop():
            raise NotReachedError(
                f"{item.where}: not read before the run was stopped (its disk or server does not answer). "
                "Try again with --resume."
            ) from error
        raise ImageError(
            f"{item.where}: not read within {read_timeout:g} s (its disk or server does not answer). "
            "Try again with --resume, or give --read-timeout more."
        ) from error


def picture_nbytes(picture: Image.Image) -> int:
    return 4 * picture.width * picture.height  # Pillow takes four bytes for an RGB pixel


@dataclass
class Read:
    """One input, ready for the model or failed; the picture itself only where something draws on it."""

    item: Input
    image_id: int
    size_wh: tuple[int, int] | None = None
    prepared: Prepared | None = None
    picture: Image.Image | None = None
    failure: str | None = None
    is_truncated: bool = False
    is_reached: bool = True

    @property
    def nbytes(self) -> int:
        """Memory it holds."""
        picture = 0 if self.picture is None else picture_nbytes(self.picture)
        return picture + (0 if self.prepared is None else self.prepared.pixels.nbytes)


@dataclass(frozen=True)
class Reader:
    """Turns an input into what the model takes; called on any thread, and never raises for a bad input.

    Once ``should_stop`` says so it reads no more.
    With ``draft`` the model sees large JPEGs as they are decoded at reduced size, the same whether or not the whole
    picture is decoded, to be drawn on, as well.
    """

    predictor: Predictor
    max_pixels: int
    keeps_pictures: bool
    draft: bool
    allow_truncated: bool = False
    read_timeout: float = 0
    should_stop: Callable[[], bool] = lambda: False

    def __call__(self, numbered: Numbered) -> Read:
        item = numbered.item
        read = Read(item, numbered.image_id, failure=item.failure)
        if item.failure is not None:
            return read
        if self.should_stop():
            read.failure, read.is_reached = STOPPED, False
            return read
        try:
            picture = read_input(
                item,
                short=self.predictor.prepare.reducible_to if self.draft else None,
                keeps_whole=self.keeps_pictures,
                max_pixels=self.max_pixels,
                allow_truncated=self.allow_truncated,
                read_timeout=self.read_timeout,
                should_stop=self.should_stop,
            )
            read.size_wh, read.is_truncated = picture.size_wh, picture.is_truncated
            read.prepared = self.predictor.prepare(picture.image, (read.size_wh[1], read.size_wh[0]))
            read.picture = (picture.whole or picture.image) if self.keeps_pictures else None
        except ImageError as error:
            # The reason alone, without the path in front: files that quote it name the path themselves.
            read.failure, read.is_reached = str(error), not isinstance(error, NotReachedError)
            for prefix in (item.where, str(item.path), str(item.path.parent)):
                read.failure = read.failure.removeprefix(f"{prefix}: ")
        except MemoryError:
            read.failure = "not enough memory to prepare it. Give a smaller version."
        except Exception as error:
            read.failure = defect(error)
        return read


def windows(
    pool: Executor,
    reader: Reader,
    numbered: Iterable[Numbered],
    predictor: Predictor,
    threads: int,
    on_alone: Callable[[int], None] | None = None,
) -> Iterator[list[Read]]:
    """What is read of ``numbered``, in its order, as much at a time as the model takes at once.

    With ``on_alone`` as many of the first as can be in work at one time come one by one, nothing read ahead; each
    one's position is told before it is touched.
    """
    is_cpu = predictor.device.type == "cpu"
    count = 1 if is_cpu else _BATCHES_PER_WINDOW * predictor.batch_size
    ahead = threads if is_cpu else max(threads, count)
    numbered = iter(numbered)
    if on_alone is not None:
        for one in islice(numbered, ahead + count + threads + 1):
            on_alone(one.position)
            yield [pool.submit(reader, one).result()]
    window: list[Read] = []
    held = 0
    with picture_memory_kept():
        for read in map_ahead(pool, reader, numbered, ahead, weight=lambda one: one.nbytes, limit=WINDOW_BYTES):
            window.append(read)
            held += read.nbytes
            if len(window) >= count or held >= WINDOW_BYTES:
                yield window
                window, held = [], 0
        if window:
            yield window


def defect(error: Exception) -> str:
    """The failure of an image that a defect of ours made."""
    _log.debug("an image failed", exc_info=error)
    return f"internal error: {type(error).__name__}: {error} (a bug in ddetr). Please report it."
