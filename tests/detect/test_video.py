from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ddetr_cli.detect.reading import read_input
from ddetr_cli.detect.sinks.sheet import thumbnail_reader
from ddetr_cli.detect.sources import Input, find_inputs
from ddetr_cli.detect.video import Frame, Video

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

av = pytest.importorskip("av")
FRAMES = 10


def write_clip(path: Path, greys: Iterable[int]) -> None:
    """A video of a frame for each grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for grey in greys:
            frame = np.full((48, 64, 3), grey, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def clips(tmp_path: Path) -> str:
    """A pattern of six short videos, the frames of each lighter and lighter."""
    for number in range(6):
        write_clip(tmp_path / f"{number}.mkv", range(0, 20 * FRAMES, 20))
    return str(tmp_path / "*.mkv")


def greys(inputs: list[Input]) -> list[int]:
    return [read_input(item, max_pixels=10_000).image.getpixel((5, 5))[0] for item in inputs]  # type: ignore[index]


def handles() -> int:
    """How many videos are open."""
    return sum(os.path.realpath(link).endswith(".mkv") for link in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("every", [1, 3, 4])
def test_videos_are_closed_when_their_last_picture_has_been_read(clips: str, every: int) -> None:
    inputs = find_inputs([clips], every=every).images
    before = handles()
    assert greys(inputs) == [20 * number for number in range(0, FRAMES, every)] * 6
    assert handles() == before


def test_frames_may_be_asked_for_in_about_their_order_and_again(clips: str) -> None:
    inputs = find_inputs([clips]).images[:FRAMES]
    shuffled = [inputs[index] for index in (1, 0, 2, 4, 3, 9, 5, 7, 8, 6, 2, 9, 0)]
    assert greys(shuffled) == [20, 0, 40, 80, 60, 180, 100, 140, 160, 120, 40, 180, 0]


def test_a_frame_deep_in_a_video_has_the_time_that_the_frames_before_it_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "long.mkv", range(41))
    decode = Video._decode

    def slow(video: Video, av: Any) -> Iterator[Any]:
        for frame in decode(video, av):
            time.sleep(0.05)
            yield frame

    monkeypatch.setattr(Video, "_decode", slow)
    last = find_inputs([str(tmp_path / "long.mkv")]).images[40]
    assert read_input(last, max_pixels=10_000, read_timeout=0.5).image.getpixel((5, 5)) == (40, 40, 40)


def test_the_contact_sheet_keeps_one_video_open_at_a_time(clips: str) -> None:
    read = thumbnail_reader()
    inputs = find_inputs([clips]).images
    before = handles()
    for item in inputs[5::FRAMES]:
        assert read(item).getpixel((5, 5)) == (100, 100, 100)
        assert handles() <= before + 1
    waiting = [item.origin.video for item in inputs[5::FRAMES] if isinstance(item.origin, Frame)]
    assert sum(len(video._kept) > 0 for video in waiting) <= 1


def test_a_video_that_a_thread_hangs_in_does_not_hold_up_who_closes_it(tmp_path: Path) -> None:
    video = Video(tmp_path / "gone.mkv")
    with video._lock:
        video.close()
