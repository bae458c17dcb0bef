from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.classes import ClassTable
from ddetr_cli.detect import patience, reading
from ddetr_cli.detect.drawing import PALETTE
from ddetr_cli.detect.results import ImageResult
from ddetr_cli.detect.sinks.sheet import MOST_PICTURES, SheetSink, thumbnail_reader
from ddetr_cli.detect.sources import Input
from ddetr_cli.errors import ImageError

if TYPE_CHECKING:
    from ddetr_cli.data.images import Picture

CLASSES = ClassTable((1, 2), ("cat", "dog"))
BLUE = (20, 40, 200)


def result(number: int, *, size: tuple[int, int] = (640, 480), failure: str | None = None) -> ImageResult:
    name = f"{number:05d}.jpg"
    box = (size[0] * 0.25, size[1] * 0.25, size[0] * 0.75, size[1] * 0.75)
    if failure is not None:
        return ImageResult(Input(Path(name), name), number, failure=failure)
    return ImageResult(Input(Path(name), name), number, size, [box], [0.9], [1])


class Reader:
    """Gives blue pictures and remembers for which inputs."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, item: Input) -> Image.Image:
        self.names.append(item.name)
        return Image.new("RGB", (640, 480), BLUE)


def make(output: Path, results: list[ImageResult]) -> tuple[Image.Image, list[str]]:
    reader = Reader()
    sink = SheetSink(output, CLASSES, reader)
    for one in results:
        sink.add(one, None)
    sink.finish()
    with Image.open(output / "sheet.jpg") as sheet:
        sheet.load()
        return sheet, reader.names


def share(sheet: Image.Image, colour: tuple[int, int, int]) -> float:
    """How much of the sheet has about this colour."""
    return float((np.abs(np.asarray(sheet).astype(int) - colour).max(axis=-1) < 40).sum())


def test_every_picture_of_a_small_run_is_on_the_sheet_with_its_boxes(tmp_path: Path) -> None:
    sheet, names = make(tmp_path, [result(number) for number in range(5)])
    assert sheet.format == "JPEG"
    assert names == [f"{number:05d}.jpg" for number in range(5)]
    one = 320 * 240
    assert 0.9 * 5 * one < share(sheet, BLUE) <= 5 * one
    assert share(sheet, PALETTE[1]) > 5 * 2 * (160 + 120) * 0.5


@pytest.mark.parametrize("count", [49, 96, 97, 98, 1000, 12_345])
def test_a_long_run_is_shown_by_pictures_evenly_chosen_from_its_beginning_to_its_end(
    tmp_path: Path, count: int
) -> None:
    _, names = make(tmp_path, [result(number) for number in range(count)])
    numbers = [int(name[:5]) for name in names]
    assert len(numbers) == MOST_PICTURES
    assert numbers[0] == 0
    steps = np.diff(numbers)
    assert steps.min() >= 1
    assert steps.max() <= 2 * max(1, steps.min())
    assert numbers[-1] >= count * 0.97 - 1


def test_the_sheet_depends_on_the_results_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(tmp_path / name, [result(number) for number in range(200)])
    assert (tmp_path / "one/sheet.jpg").read_bytes() == (tmp_path / "two/sheet.jpg").read_bytes()


def test_failed_pictures_are_left_out_and_one_that_has_gone_is_a_grey_field(tmp_path: Path) -> None:
    def gone(item: Input) -> Image.Image:
        raise ImageError(f"{item.path}: no such file. Check the path.")

    sink = SheetSink(tmp_path, CLASSES, gone)
    sink.add(result(0, failure="not an image."), None)
    sink.add(result(1), None)
    sink.finish()
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert share(sheet.convert("RGB"), (205, 205, 205)) > 0.9 * 320 * 240


@pytest.mark.parametrize("results", [[], [result(0, failure="not an image.")]])
def test_a_run_without_any_picture_still_has_a_sheet(tmp_path: Path, results: list[ImageResult]) -> None:
    sheet, names = make(tmp_path, results)
    assert names == []
    assert sheet.width > 500


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (20_000, 40)])
def test_pictures_of_any_shape_fit(tmp_path: Path, size: tuple[int, int]) -> None:
    sheet, _ = make(tmp_path, [result(0, size=size), result(1)])
    assert sheet.width < 2000


def test_hundreds_of_classes_do_not_push_the_pictures_off_the_sheet(tmp_path: Path) -> None:
    classes = ClassTable(tuple(range(300)), tuple(f"a rather long class name {number}" for number in range(300)))
    one = ImageResult(Input(Path("a"), "a"), 1, (64, 48), [(1.0, 1.0, 2.0, 2.0)] * 300, [0.5] * 300, [*range(300)])
    sink = SheetSink(tmp_path, classes, Reader())
    sink.add(one, None)
    sink.finish()
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.height < 500


@pytest.mark.parametrize(("read_timeout", "is_stopped"), [(0.2, False), (86_400, True)])
def test_a_disk_that_is_gone_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch, read_timeout: float, is_stopped: bool
) -> None:
    release, begun = threading.Event(), []

    def hang(path: Path, **_: object) -> Picture:
        begun.append(path)
        release.wait()
        raise ImageError("gone.")

    monkeypatch.setattr(reading, "read_picture", hang)
    monkeypatch.setattr(patience, "_GRACE", 0.2)
    read = thumbnail_reader(read_timeout=read_timeout, should_stop=lambda: is_stopped)
    for number in range(48):
        with pytest.raises(ImageError, match="does not answer"):
            read(Input(Path(f"{number}.jpg"), f"{number}.jpg"))
    assert begun == [Path("0.jpg")]
    release.set()


def test_a_picture_that_is_damaged_keeps_no_other_off_the_sheet(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    Image.new("RGB", (64, 48), BLUE).save(tmp_path / "b.png")
    read = thumbnail_reader()
    with pytest.raises(ImageError, match="not an image"):
        read(Input(tmp_path / "a.jpg", "a.jpg"))
    assert read(Input(tmp_path / "b.png", "b.png")).size == (64, 48)
