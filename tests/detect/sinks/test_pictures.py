from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.classes import ClassTable
from ddetr_cli.detect.results import ImageResult
from ddetr_cli.detect.sinks.coco import CocoSink
from ddetr_cli.detect.sinks.names import picture_name
from ddetr_cli.detect.sinks.pictures import CropsSink, PicturesSink
from ddetr_cli.detect.sources import Input
from ddetr_cli.errors import OutputError

CLASSES = ClassTable((1, 2, 7), ("cat", "traffic light", None))
INFO = {"description": "ddetr detect"}
Box = tuple[float, float, float, float]


def result(name: str = "a.jpg", image_id: int = 1, *, rows: int = 1, failure: str | None = None) -> ImageResult:
    if failure is not None:
        return ImageResult(Input(Path(name), name), image_id, failure=failure)
    box = (-3.25, 10.123456, 50.5, 40.0)
    return ImageResult(Input(Path(name), name), image_id, (64, 48), [box] * rows, [0.123456789] * rows, [2] * rows)


def draw(sink: PicturesSink | CropsSink, one: ImageResult, picture: Image.Image) -> None:
    sink.add(one, sink.render(one, picture))


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "kind"), [("x/a.jpg", "JPEG"), ("a.png", "PNG"), ("a.tif", "JPEG"), ("a.JPEG", "JPEG")]
)
def test_pictures_mirror_the_inputs_and_carry_no_metadata(tmp_path: Path, name: str, kind: str) -> None:
    picture = noise()
    picture.info = {"exif": b"Exif\0\0secret", "comment": b"secret", "icc_profile": b"secret"}
    sink = PicturesSink(tmp_path, CLASSES)
    draw(sink, result(name), picture)
    sink.finish()
    path = tmp_path / "annotated" / picture_name(name)
    with Image.open(path) as drawn:
        assert (drawn.format, drawn.size) == (kind, (64, 48))
        assert len(drawn.getexif()) == 0
        assert not {"exif", "comment", "icc_profile"} & set(drawn.info)
    assert b"secret" not in path.read_bytes()


def test_a_picture_longer_than_a_jpeg_can_be_is_drawn_smaller(tmp_path: Path) -> None:
    sink = PicturesSink(tmp_path, CLASSES)
    draw(sink, result("a.tif"), Image.new("RGB", (70_000, 40)))
    with Image.open(tmp_path / "annotated/a.tif.jpg") as drawn:
        assert drawn.width == 65_500


def test_a_failed_image_has_no_picture(tmp_path: Path) -> None:
    sink = PicturesSink(tmp_path, CLASSES)
    sink.add(result(failure="not an image."), None)
    sink.finish()
    assert list((tmp_path / "annotated").iterdir()) == []


def test_overwriting_removes_only_pictures_that_the_earlier_run_drew(tmp_path: Path) -> None:
    for names in (("a.jpg", "b.tif"), ("a.jpg",)):
        coco, pictures = CocoSink(tmp_path, CLASSES, INFO), PicturesSink(tmp_path, CLASSES)
        for number, name in enumerate(names, start=1):
            coco.add(result(name, number), None)
            draw(pictures, result(name, number), noise())
        (tmp_path / "annotated/mine.jpg").write_bytes(b"")
        coco.finish()
        pictures.finish()
    assert sorted(path.name for path in (tmp_path / "annotated").iterdir()) == ["a.jpg", "mine.jpg"]


def test_an_edited_images_json_cannot_make_overwriting_delete_files_elsewhere(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "annotated").mkdir(parents=True)
    victim = tmp_path / "victim.jpg"
    victim.write_bytes(b"")
    images = [{"file_name": "../../victim.jpg"}, {"file_name": str(victim)}, {}]
    for text in (
        json.dumps({"info": INFO, "images": images[:2]}),
        json.dumps({"info": INFO, "images": images}),
        "[",
        "[]",
    ):
        (output / "images.json").write_text(text)
        PicturesSink(output, CLASSES).finish()
        assert victim.exists()


def test_a_disk_that_fills_up_while_drawing_leaves_no_half_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = PicturesSink(tmp_path, CLASSES)
    draw(sink, result("a.jpg"), noise())

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match=r"annotated/b\.jpg: not written \(No space left on device\)"):
        draw(sink, result("b.jpg", 2), noise())
    assert [path.name for path in (tmp_path / "annotated").iterdir()] == ["a.jpg"]


def test_a_result_handed_over_again_keeps_its_picture(tmp_path: Path) -> None:
    coco, pictures = CocoSink(tmp_path, CLASSES, INFO), PicturesSink(tmp_path, CLASSES)
    coco.add(result("a.jpg"), None)
    draw(pictures, result("a.jpg"), noise())
    coco.finish()
    again = PicturesSink(tmp_path, CLASSES)
    again.add(result("a.jpg"), None)
    again.finish()
    assert (tmp_path / "annotated/a.jpg").exists()


def found(name: str, *rows: tuple[Box, float, int]) -> ImageResult:
    boxes, scores, labels = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    return ImageResult(Input(Path(name), name), 1, (64, 48), boxes, scores, labels)  # type: ignore[arg-type]


def crops_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_crops_sort_by_picture_and_score_and_hold_the_pixels_of_the_box(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 48), (10, 20, 30))
    picture.paste((200, 100, 50), (8, 16, 24, 40))
    sink = CropsSink(tmp_path, CLASSES)
    draw(sink, found("x/b.png", ((8.0, 16.0, 23.5, 39.5), 0.93, 1), ((-9.0, -9.0, 5.0, 5.0), 0.5, 2)), picture)
    draw(sink, found("x/a.jpg", ((0.0, 0.0, 64.0, 48.0), 1.0, 0)), picture)
    sink.finish()
    names = crops_in(tmp_path / "crops")
    assert names == [
        "x/a.jpg/0001-1.00-cat.jpg",
        "x/b.png/0001-0.93-traffic-light.jpg",
        "x/b.png/0002-0.50-class-7.jpg",
    ]
    sizes = []
    for name in names:
        with Image.open(tmp_path / "crops" / name) as crop:
            sizes.append(crop.size)
            assert crop.format == "JPEG"
            assert len(crop.getexif()) == 0
    assert sizes == [(64, 48), (16, 24), (6, 6)]
    with Image.open(tmp_path / "crops" / names[1]) as crop:
        assert np.abs(np.asarray(crop).astype(int) - (200, 100, 50)).max() <= 3  # JPEG


def test_a_box_outside_its_picture_has_no_crop_and_leaves_the_ranks_of_the_others(tmp_path: Path) -> None:
    sink = CropsSink(tmp_path, CLASSES)
    draw(sink, found("a.jpg", ((90.0, 0.0, 95.0, 5.0), 0.9, 0), ((1.0, 1.0, 9.0, 9.0), 0.8, 0)), noise())
    assert crops_in(tmp_path / "crops") == ["a.jpg/0002-0.80-cat.jpg"]


def test_pictures_without_detections_and_failed_ones_have_no_crops(tmp_path: Path) -> None:
    sink = CropsSink(tmp_path, CLASSES)
    draw(sink, found("a.jpg"), noise())
    sink.add(result("b.jpg", 2, failure="not an image."), None)
    sink.finish()
    assert crops_in(tmp_path / "crops") == []
    assert (tmp_path / "crops").is_dir()


@pytest.mark.parametrize("name", ["../../up", "a/b", ".", "", "\0", "猫", "x" * 300, "con:", "a\nb"])
def test_any_class_name_becomes_part_of_a_file_name(tmp_path: Path, name: str) -> None:
    sink = CropsSink(tmp_path, ClassTable((1,), (name,)))
    draw(sink, found("a.jpg", ((1.0, 1.0, 9.0, 9.0), 0.8, 0)), noise())
    (crop,) = (tmp_path / "crops").rglob("0001-*")
    assert crop.name.startswith("0001-0.80-")
    assert crop.parent == tmp_path / "crops/a.jpg"


def test_overwriting_removes_crops_of_the_earlier_run_only(tmp_path: Path) -> None:
    box = (1.0, 1.0, 9.0, 9.0)
    for names, count in ((("a.jpg", "b.jpg"), 3), (("a.jpg",), 1)):
        coco, crops = CocoSink(tmp_path, CLASSES, INFO), CropsSink(tmp_path, CLASSES)
        for name in names:
            coco.add(found(name), None)
            draw(crops, found(name, *[(box, 0.5, 0)] * count), noise())
        (tmp_path / "crops/a.jpg/mine.jpg").write_bytes(b"")
        coco.finish()
        crops.finish()
    assert crops_in(tmp_path / "crops") == ["a.jpg/0001-0.50-cat.jpg", "a.jpg/mine.jpg"]
    assert not (tmp_path / "crops/b.jpg").exists()
