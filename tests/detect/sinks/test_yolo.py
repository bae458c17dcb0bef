from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddetr_cli.classes import COCO_TABLE, ClassTable
from ddetr_cli.detect.results import ImageResult
from ddetr_cli.detect.sinks.coco import CocoSink
from ddetr_cli.detect.sinks.yolo import YoloSink
from ddetr_cli.detect.sources import Input

CLASSES = ClassTable((1, 2, 7), (None, "dog", "cat"))
Box = tuple[float, float, float, float]


def result(name: str, *rows: tuple[Box, int], failure: str | None = None) -> ImageResult:
    size = None if failure else (200, 100)
    boxes, labels = [box for box, _ in rows], [label for _, label in rows]
    return ImageResult(Input(Path(name), name), 1, size, boxes, [0.5] * len(rows), labels, failure=failure)


def write(output: Path, *results: ImageResult, classes: ClassTable = CLASSES) -> None:
    sink = YoloSink(output, classes)
    for one in results:
        sink.add(one, None)
    sink.finish()


def read(path: Path) -> np.ndarray:
    """A label file as trainers read it: rows of five numbers, the first a whole class number."""
    if not path.read_text():
        return np.zeros((0, 5))
    rows = np.loadtxt(path, ndmin=2)
    assert rows.shape[1] == 5
    assert (rows[:, 1:] >= 0).all() and (rows[:, 1:] <= 1).all()
    assert (rows[:, 0] == rows[:, 0].astype(int)).all()
    return np.asarray(rows)


def test_boxes_are_class_centre_and_size_in_fractions_in_a_file_beside_the_pictures_name(tmp_path: Path) -> None:
    write(tmp_path, result("sub/a.png", ((20.0, 10.0, 60.0, 20.0), 1), ((0.0, 0.0, 200.0, 100.0), 2)))
    rows = read(tmp_path / "labels/sub/a.txt")
    assert rows.tolist() == [[0, 0.2, 0.15, 0.2, 0.1], [1, 0.5, 0.5, 1, 1]]
    assert (tmp_path / "classes.txt").read_text().splitlines() == ["dog", "cat", "class 1"]


def test_boxes_are_clipped_to_the_picture_and_those_outside_have_no_line(tmp_path: Path) -> None:
    boxes = [
        (-20.0, -10.0, 20.0, 10.0),
        (300.0, 10.0, 320.0, 20.0),
        (10.0, 10.0, 10.0, 20.0),
        (50.0, 20.0, 40.0, 30.0),
    ]
    write(tmp_path, result("a.jpg", *((box, 1) for box in boxes)))
    assert read(tmp_path / "labels/a.txt").tolist() == [[0, 0.05, 0.05, 0.1, 0.1]]


def test_an_image_without_detections_has_an_empty_file_and_a_failed_one_none(tmp_path: Path) -> None:
    write(tmp_path, result("a.jpg"), result("b.jpg", failure="not an image."))
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["a.txt"]
    assert len(read(tmp_path / "labels/a.txt")) == 0


def test_coco_classes_have_the_numbers_that_yolo_gives_them(tmp_path: Path) -> None:
    write(tmp_path, result("a.jpg", ((0.0, 0.0, 9.0, 9.0), 90), ((0.0, 0.0, 9.0, 9.0), 1)), classes=COCO_TABLE)
    names = (tmp_path / "classes.txt").read_text().splitlines()
    assert names[:3] == ["person", "bicycle", "car"]
    assert names[79] == "toothbrush"
    assert read(tmp_path / "labels/a.txt")[:, 0].tolist() == [79, 0]


def test_class_names_take_one_line_each(tmp_path: Path) -> None:
    write(tmp_path, classes=ClassTable((1, 2), ("a\nb", "c")))
    assert (tmp_path / "classes.txt").read_text().splitlines() == ["a\\nb", "c"]


def test_labels_can_be_trained_on(tmp_path: Path) -> None:
    """Our own reader of YOLO's layout takes them back; that it reads other tools' is tested with it."""
    from PIL import Image

    from ddetr_cli.data.layouts import DatasetPaths
    from ddetr_cli.data.yolo import read_yolo

    (tmp_path / "images").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "images/a.png")
    write(tmp_path, result("a.png", ((20.0, 10.0, 60.0, 20.0), 2)))
    names = (tmp_path / "classes.txt").read_text().splitlines()
    (tmp_path / "data.yaml").write_text(f"train: images\nnames: {names}\n")
    document, findings = read_yolo(DatasetPaths(tmp_path / "images", tmp_path / "data.yaml", "train", "yolo"))
    (annotation,) = document["annotations"]
    assert annotation["bbox"] == pytest.approx([20, 10, 40, 10])
    assert (annotation["category_id"], findings) == (1, ())


def test_overwriting_removes_labels_of_images_that_are_gone(tmp_path: Path) -> None:
    for names in (("a.jpg", "b.jpg"), ("a.jpg",)):
        coco = CocoSink(tmp_path, CLASSES, {"description": "ddetr detect"})
        for name in names:
            coco.add(result(name), None)
        write(tmp_path, *(result(name) for name in names))
        (tmp_path / "labels/mine.txt").write_bytes(b"")
        coco.finish()
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["a.txt", "mine.txt"]
