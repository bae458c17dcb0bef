"""Frames of video files as pictures, through PyAV, where it is installed."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ddetr_cli.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from PIL import Image

VIDEO_SUFFIXES = frozenset({
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv",
})  # fmt: skip
# Frames are asked for nearly in order, by several threads: so many decoded ones wait for theirs.
_KEPT = 32


@dataclass(frozen=True)
class Frame:
    """One frame of a video."""

    video: Video
    number: int

    def picture(self, max_pixels: int) -> Image.Image:
        """The frame, upright, in RGB. Raises ImageError."""
        return self.video.frame(self.number, max_pixels)


class Video:
    """A video file, decoded once from front to back while its frames are asked for in about that order.

    Every ``every``-th of them is a picture. The file is closed when the last has been asked for.
    """

    def __init__(self, path: Path, every: int = 1) -> None:
        self.path = path
        self.decoded = 0  # frames so far, those decoded again too: whether a long way to a frame goes on
        self._every = every
        self._last: int | None = None
        self._lock = threading.Lock()
        self._frames: Iterator[Any] | None = None
        self._next = 0
        self._kept: dict[int, Any] = {}

    @cached_property
    def pictures(self) -> range:
        """The numbers of the frames that are pictures, by counting packets. Raises ImageError."""
        av = self._av()
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                count = sum(1 for packet in container.demux(stream) if packet.size)
        except Exception as error:
            raise ImageError(f"{self.path}: {_why(error)}") from error
        numbers = range(0, count, self._every)
        self._last = numbers[-1] if numbers else None
        return numbers

    def close(self) -> None:
        """Close the file, and forget the frames that wait to be asked for; not while one is being read.

        Whoever reads may never return from a disk that is gone.
        """
        if self._lock.acquire(blocking=False):
            self._frames = None
            self._kept.clear()
            self._lock.release()

    def frame(self, number: int, max_pixels: int) -> Image.Image:
        """Frame ``number`` from 0 on, upright, in RGB. Raises ImageError."""
        av = self._av()
        with self._lock:
            try:
                found = self._decode_to(av, number)
                if found.width * found.height > max_pixels:
                    raise ImageError(
                        f"{self.path}: frames of {found.width}x{found.height} exceed the limit of pixels."
                    )
            except ImageError:
                raise
            except StopIteration as error:
                raise ImageError(
                    f"{self.path}: ends before frame {number} (damaged or cut). Copy it again."
                ) from error
            except Exception as error:
                raise ImageError(f"{self.path}: {_why(error)}") from error
        picture: Image.Image = found.to_image()
        turned = round(getattr(found, "rotation", 0) / 90) * 90 % 360
        return picture.rotate(turned, expand=True) if turned else picture

    def _decode_to(self, av: Any, number: int) -> Any:
        if number in self._kept:
            return self._kept.pop(number)
        if self._frames is None or number < self._next:
            self._frames, self._next = self._decode(av), 0
            self._kept.clear()
        while True:
            found = next(self._frames)
            self._next += 1
            self.decoded += 1
            if self._next - 1 == number:
                if number == self._last:
                    self._frames = None
                return found
            if (self._next - 1) % self._every == 0:
                self._kept[self._next - 1] = found
                if len(self._kept) > _KEPT:
                    del self._kept[min(self._kept)]

    def _decode(self, av: Any) -> Iterator[Any]:
        with av.open(str(self.path)) as container:
            yield from container.decode(video=0)

    def _av(self) -> Any:
        try:
            import av
        except ImportError as error:
            raise ImageError(
                f"{self.path}: a video (no decoder is installed). Run pip install 'ddetr-cli[video]'."
            ) from error
        return av


def _why(error: Exception) -> str:
    if isinstance(error, IndexError):
        return "no video stream in it. Give a video file."
    return f"damaged video ({' '.join(str(error).split())[:200] or type(error).__name__}). Copy it again."
