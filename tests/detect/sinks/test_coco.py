from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import pytest

from ddetr_cli.classes import ClassTable
from ddetr_cli.detect.results import ImageResult
from ddetr_cli.detect.sinks.coco import CocoRowsSink, CocoSink
from ddetr_cli.detect.sources import Input

CLASSES = ClassTable((1, 2, 7), ("cat", "dog", None))
INFO = {"description": "ddetr detect"}


def result(name: str = "a.jpg", image_id: int = 1, *, rows: int = 1, failure: str | None = None) -> ImageResult:
    if failure is not None:
        return ImageResult(Input(Path(name), name), image_id, failure=failure)
    box = (-3.25, 10.123456, 50.5, 40.0)
    return ImageResult(Input(Path(name), name), image_id, (64, 48), [box] * rows, [0.123456789] * rows, [2] * rows)


def write_coco(
    output: Path, *results: ImageResult
) -> tuple[list[dict[str, object]], dict[str, list[dict[str, object]]]]:
    sink = CocoSink(output, CLASSES, INFO)
    for one in results:
        sink.add(one, None)
    sink.finish()
    return json.loads((output / "detections.json").read_text()), json.loads((output / "images.json").read_text())


def test_detections_are_a_coco_results_list_with_unclipped_boxes_and_the_tables_category_ids(tmp_path: Path) -> None:
    detections, _ = write_coco(tmp_path, result())
    assert detections == [
        {"image_id": 1, "category_id": 7, "bbox": [-3.25, 10.1235, 53.75, 29.8765], "score": 0.123456789}
    ]


def test_images_hold_every_input_the_failed_ones_with_their_reason(tmp_path: Path) -> None:
    _, images = write_coco(tmp_path, result(), result("b.jpg", 2, failure="not an image."))
    assert images == {
        "info": INFO,
        "licenses": [],
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48},
            {"id": 2, "file_name": "b.jpg", "width": None, "height": None, "failed": "not an image."},
        ],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 7, "name": "class 7"}],
    }


def test_pycocotools_loads_the_pair(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    write_coco(tmp_path, result(rows=3), result("b.jpg", 2, failure="not an image."))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "images.json"))  # type: ignore[no-untyped-call]
        results = truth.loadRes(str(tmp_path / "detections.json"))  # type: ignore[no-untyped-call]
    assert len(results.getAnnIds(imgIds=[1], catIds=[7])) == 3


def test_a_run_without_detections_gives_an_empty_list(tmp_path: Path) -> None:
    detections, images = write_coco(tmp_path, result(rows=0))
    assert detections == []
    assert len(images["images"]) == 1


def test_nothing_has_its_final_name_before_the_end_and_an_abandoned_run_leaves_nothing(tmp_path: Path) -> None:
    sink = CocoSink(tmp_path, CLASSES, INFO)
    sink.add(result(), None)
    assert not (tmp_path / "detections.json").exists()
    assert not (tmp_path / "images.json").exists()
    sink.abandon()
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_does_not_have_are_never_written(tmp_path: Path) -> None:
    sink = CocoSink(tmp_path, CLASSES, INFO)
    bad = ImageResult(Input(Path("a"), "a"), 1, (64, 48), [(float("nan"), 0.0, 1.0, 1.0)], [0.5], [0])
    with pytest.raises(ValueError, match="JSON"):
        sink.add(bad, None)
    sink.abandon()


def test_a_file_name_that_is_not_utf8_comes_back_byte_for_byte(tmp_path: Path) -> None:
    name = os.fsdecode(b"bad\xff.jpg")
    _, images = write_coco(tmp_path, result(name))
    assert os.fsencode(str(images["images"][0]["file_name"])) == b"bad\xff.jpg"
    assert (tmp_path / "images.json").read_bytes().isascii()


class Stream:
    """A target that keeps what it is given."""

    def __init__(self) -> None:
        self.data, self.ending = b"", ""

    def write(self, data: bytes) -> None:
        self.data += data

    def commit(self, *, durable: bool) -> None:
        self.ending += "finished"

    def abandon(self) -> None:
        self.ending += "abandoned"


def test_the_results_list_alone_can_be_streamed_image_by_image() -> None:
    stream = Stream()
    sink = CocoRowsSink(stream, CLASSES)
    sink.add(result(rows=2), None)
    assert stream.data.count(b"\n") == 2
    sink.add(result("b.jpg", 2, failure="not an image."), None)
    sink.add(result("c.jpg", 3), None)
    sink.finish()
    assert [row["image_id"] for row in json.loads(stream.data)] == [1, 1, 3]
    assert stream.ending == "finished"


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    import tracemalloc

    sink = CocoSink(tmp_path, CLASSES, INFO)
    tracemalloc.start()
    try:
        for number in range(2000):
            sink.add(result(f"{number}.jpg", number), None)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
        sink.abandon()
