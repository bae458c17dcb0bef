from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from ddetr_cli.atomic import AtomicFile
from ddetr_cli.classes import ClassTable
from ddetr_cli.detect.results import ImageResult
from ddetr_cli.detect.sinks.tables import CsvSink, JsonLinesSink
from ddetr_cli.detect.sources import Input

CLASSES = ClassTable((1, 2, 7), ("cat", 'a "dog", or\nso', None))
BOX = (-3.25, 10.123456, 50.5, 40.0)
ODD_NAMES = ("a.jpg", 'he said "no", twice.jpg', "new\nline.jpg", "=1+1.jpg", "Größe 猫.jpg", " a ;\t.jpg")


def result(name: str = "a.jpg", image_id: int = 1, *, labels: tuple[int, ...] = (2,)) -> ImageResult:
    rows = len(labels)
    return ImageResult(Input(Path(name), name), image_id, (64, 48), [BOX] * rows, [0.123456789] * rows, [*labels])


def failed(name: str, image_id: int) -> ImageResult:
    return ImageResult(Input(Path(name), name), image_id, failure="not an image (the file is empty).")


def write_lines(folder: Path, *results: ImageResult) -> list[dict[str, object]]:
    sink = JsonLinesSink(AtomicFile(folder / "out.jsonl"), CLASSES)
    for one in results:
        sink.add(one, None)
    sink.finish()
    return [json.loads(line) for line in (folder / "out.jsonl").read_bytes().split(b"\n")[:-1]]


def write_csv(folder: Path, *results: ImageResult) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    sink = CsvSink(AtomicFile(folder / "out.csv"), CLASSES, AtomicFile(folder / "failures.csv"))
    for one in results:
        sink.add(one, None)
    sink.finish()
    tables = []
    for name in ("out.csv", "failures.csv"):
        with (folder / name).open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file, strict=True)))
    return tables[0], tables[1]


def test_every_image_is_a_line_of_json_the_failed_ones_with_their_reason(tmp_path: Path) -> None:
    assert write_lines(tmp_path, result(), failed("b.jpg", 2), result("c.jpg", 3, labels=())) == [
        {
            "image_id": 1,
            "file_name": "a.jpg",
            "width": 64,
            "height": 48,
            "detections": [
                {"category_id": 7, "label": "class 7", "bbox": [-3.25, 10.1235, 53.75, 29.8765], "score": 0.123456789}
            ],
        },
        {
            "image_id": 2,
            "file_name": "b.jpg",
            "width": None,
            "height": None,
            "failed": "not an image (the file is empty).",
        },
        {"image_id": 3, "file_name": "c.jpg", "width": 64, "height": 48, "detections": []},
    ]


def test_dropped_detections_are_counted_in_their_line(tmp_path: Path) -> None:
    one = ImageResult(Input(Path("a"), "a"), 1, (64, 48), dropped=3)
    assert write_lines(tmp_path, one)[0]["dropped"] == 3


def test_names_of_any_bytes_come_back_from_json_lines(tmp_path: Path) -> None:
    names = (*ODD_NAMES, os.fsdecode(b"bad\xff.jpg"), "\u2028.jpg")
    rows = write_lines(tmp_path, *(result(name, number) for number, name in enumerate(names)))
    assert [row["file_name"] for row in rows] == list(names)


def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    sink = JsonLinesSink(AtomicFile(tmp_path / "x"), CLASSES)
    with pytest.raises(ValueError, match="JSON"):
        sink.add(ImageResult(Input(Path("a"), "a"), 1, (64, 48), [BOX], [float("nan")], [0]), None)
    sink.abandon()
    assert list(tmp_path.iterdir()) == []


def test_every_row_of_the_csv_is_a_detection(tmp_path: Path) -> None:
    rows, failures = write_csv(tmp_path, result(labels=(2, 0)), failed("b.jpg", 2), result("c.jpg", 3, labels=()))
    assert rows[0] == {
        "file_name": "a.jpg",
        "image_id": "1",
        "category_id": "7",
        "label": "class 7",
        "score": "0.123456789",
        "x": "-3.25",
        "y": "10.1235",
        "width": "53.75",
        "height": "29.8765",
    }
    assert [(row["file_name"], row["label"]) for row in rows] == [("a.jpg", "class 7"), ("a.jpg", "cat")]
    assert failures == [{"file_name": "b.jpg", "image_id": "2", "failed": "not an image (the file is empty)."}]


def test_odd_names_come_back_from_the_csv_and_lines_end_as_the_standard_says(tmp_path: Path) -> None:
    rows, _ = write_csv(tmp_path, *(result(name, number, labels=(1,)) for number, name in enumerate(ODD_NAMES)))
    assert [row["file_name"] for row in rows] == list(ODD_NAMES)
    assert {row["label"] for row in rows} == {CLASSES.name(1)}
    assert (tmp_path / "out.csv").read_bytes().count(b"\r\n") == 1 + len(ODD_NAMES)


def test_a_name_that_is_not_utf8_leaves_the_csv_readable(tmp_path: Path) -> None:
    rows, _ = write_csv(tmp_path, result(os.fsdecode(b"bad\xff.jpg")))
    assert rows[0]["file_name"] == "bad\\udcff.jpg"


def test_the_numbers_of_csv_json_lines_and_coco_are_the_same(tmp_path: Path) -> None:
    from ddetr_cli.inference.results import coco_row

    row = coco_row(1, 7, BOX, 0.123456789)
    (line,) = write_lines(tmp_path, result())
    ((table,), _) = write_csv(tmp_path, result())
    (detection,) = line["detections"]  # type: ignore[misc]
    assert detection["bbox"] == row["bbox"] == [float(table[key]) for key in ("x", "y", "width", "height")]
    assert detection["score"] == row["score"] == float(table["score"])


def test_an_abandoned_table_leaves_nothing(tmp_path: Path) -> None:
    sink = CsvSink(AtomicFile(tmp_path / "out.csv"), CLASSES, AtomicFile(tmp_path / "failures.csv"))
    sink.add(result(), None)
    sink.abandon()
    assert list(tmp_path.iterdir()) == []
