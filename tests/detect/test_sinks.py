from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.classes import ClassTable
from ddetr_cli.detect.run import ImageResult
from ddetr_cli.detect.sinks import CocoSink, PicturesSink, picture_name, prepare_output
from ddetr_cli.detect.sources import Input, find_inputs
from ddetr_cli.errors import OutputError, UsageError

CLASSES = ClassTable((1, 2, 7), ("cat", "dog", None))
INFO = {"description": "ddetr detect"}
FORMATS = frozenset({"coco", "images"})


def result(name: str = "a.jpg", image_id: int = 1, *, rows: int = 1, failure: str | None = None) -> ImageResult:
    if failure is not None:
        return ImageResult(Input(Path(name), name), image_id, failure=failure)
    box = (-3.25, 10.123456, 50.5, 40.0)
    return ImageResult(Input(Path(name), name), image_id, (64, 48), [box] * rows, [0.123456789] * rows, [2] * rows)


def draw(sink: PicturesSink, one: ImageResult, picture: Image.Image) -> None:
    sink.add(one, sink.render(one, picture))


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


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("b.JPG", "b.JPG"),
        ("b.jpeg", "b.jpeg"),
        ("b.png", "b.png"),
        ("b.tif", "b.tif.jpg"),
        ("a/b.webp", "a/b.webp.jpg"),
        ("noending", "noending.jpg"),
    ],
)
def test_jpeg_and_png_keep_their_names_and_all_others_gain_jpg(name: str, drawn: str) -> None:
    assert picture_name(name) == drawn


@pytest.mark.parametrize("letter", ["a", "é", "\udcff"])
def test_a_name_already_as_long_as_the_disk_allows_stays_within_it(letter: str) -> None:
    long = letter * (251 // len(os.fsencode(letter)))
    names = [picture_name(f"sub/{long}.{ending}") for ending in ("tif", "bmp")]
    assert names[0] != names[1]
    for name in names:
        assert name.startswith("sub/")
        assert name.endswith(".jpg")
        assert len(os.fsencode(name.removeprefix("sub/"))) <= 255


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


def inputs_in(folder: Path, *names: str) -> list[Input]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise().save(folder / name)
    return find_inputs([str(folder)], output=folder / "out").images


def test_a_new_output_is_accepted_and_not_made_yet(tmp_path: Path) -> None:
    prepare_output(tmp_path / "out", inputs_in(tmp_path / "in", "a.jpg"), overwrite=False, formats=FORMATS)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_accepted_only_with_overwrite_and_keeps_what_is_not_ours(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    inputs = inputs_in(tmp_path / "in", "a.jpg")
    with pytest.raises(OutputError, match="exists already"):
        prepare_output(output, inputs, overwrite=False, formats=FORMATS)
    (output / "notes.txt").write_bytes(b"")
    with pytest.raises(OutputError, match=r"exists already\. Choose another --output, or pass --overwrite"):
        prepare_output(output, inputs, overwrite=False, formats=FORMATS)
    prepare_output(output, inputs, overwrite=True, formats=FORMATS)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_a_file_as_output_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(UsageError, match="--output takes a folder"):
        prepare_output(tmp_path / "out", inputs_in(tmp_path / "in", "a.jpg"), overwrite=True, formats=FORMATS)


def test_an_annotated_picture_never_replaces_an_input(tmp_path: Path) -> None:
    inputs = inputs_in(tmp_path / "out" / "annotated", "a.jpg")
    before = (tmp_path / "out/annotated/a.jpg").read_bytes()
    with pytest.raises(UsageError, match="would replace an input"):
        prepare_output(tmp_path / "out", inputs, overwrite=True, formats=FORMATS)
    prepare_output(tmp_path / "out", inputs, overwrite=True, formats=frozenset({"coco"}))
    assert (tmp_path / "out/annotated/a.jpg").read_bytes() == before


def test_pictures_of_one_stem_and_different_endings_do_not_meet(tmp_path: Path) -> None:
    inputs = inputs_in(tmp_path / "in", "x.jpg", "x.png", "x.tif", "x.bmp", "a/x.jpg", "b/x.jpg")
    prepare_output(tmp_path / "out", inputs, overwrite=False, formats=FORMATS)


def test_two_inputs_drawn_to_one_name_are_refused_unless_nothing_is_drawn(tmp_path: Path) -> None:
    inputs = inputs_in(tmp_path / "in", "x.tif", "x.tif.jpg")
    with pytest.raises(UsageError, match=r"its output x\.tif\.jpg is also that of"):
        prepare_output(tmp_path / "out", inputs, overwrite=False, formats=FORMATS)
    prepare_output(tmp_path / "out", inputs, overwrite=False, formats=frozenset({"coco"}))


def test_temporary_files_of_a_killed_run_are_swept_up(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "annotated").mkdir(parents=True)
    (output / "annotated/.ddetr-99-1.tmp").write_bytes(b"half")
    prepare_output(output, inputs_in(tmp_path / "in", "a.jpg"), overwrite=True, formats=FORMATS)
    assert list((output / "annotated").iterdir()) == []
