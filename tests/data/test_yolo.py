from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ddetr_cli.data.annotations import inspect_split, read_split
from ddetr_cli.data.locate import locate_dataset
from ddetr_cli.data.pictures import check_images, read_dataset_image
from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.data.yolo import label_file
from ddetr_cli.errors import DatasetError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training pictures of 100x50, one of them in a sub-folder and without labels, and one of val."""
    for name in ("train/a.png", "train/b.png", "train/more/c.png", "val/d.png"):
        for folder in ("images", "labels"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 50)).save(tmp_path / "images" / name)
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0.2 0.4\n\n1 0.1 0.2 0.1 0.2\n")
    (tmp_path / "labels/train/b.txt").write_text("1 0.1 0.1 0.5 0.1 0.5 0.9 0.2 0.3\n")
    (tmp_path / "labels/val/d.txt").write_text("0 0.5 0.5 1 1\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n")
    return tmp_path


def train_of(root: Path) -> CocoAnnotations:
    return inspect_split(locate_dataset(root, purpose="train"), purpose="train")


def test_lines_become_boxes_in_pixels_and_polygons_their_bounds(root: Path) -> None:
    found = read_split(locate_dataset(root, purpose="train"), purpose="train")
    assert [(c.id, c.name) for c in found.categories] == [(0, "cat"), (1, "dog")]
    assert [(i.id, i.width, i.height) for i in found.images] == [
        ("a.png", 100, 50), ("b.png", 100, 50), ("more/c.png", 100, 50),
    ]  # fmt: skip
    assert [(a.id, a.image_id, a.category_id) for a in found.annotations] == [
        ("a.txt:1", "a.png", 0), ("a.txt:3", "a.png", 1), ("b.txt:1", "b.png", 1),
    ]  # fmt: skip
    boxes = [(40, 15, 20, 20), (5, 5, 10, 10), (10, 5, 40, 40)]
    for annotation, expected in zip(found.annotations, boxes, strict=True):
        assert annotation.bbox_xywh == pytest.approx(expected)
        assert annotation.area == pytest.approx(expected[2] * expected[3])
    assert found.repairs == ()
    assert check_images(found, root / "images/train").images == found.images


def test_val_is_found_and_the_yaml_may_be_named_itself(root: Path) -> None:
    paths = locate_dataset(root / "data.yaml", purpose="train")
    assert paths.layout == "yolo" and paths.val is not None
    assert read_split(paths.val).annotations[0].bbox_xywh == (0, 0, 100, 50)
    assert locate_dataset(root) == paths.val
    assert locate_dataset(None, annotations=root / "data.yaml") == paths.val


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0 0.5 0.5 0.2", "annotation id 'a.txt:1': [0.5, 0.5, 0.2]"),
        ("0 0.5 0.5 x 0.2", "annotation id 'a.txt:1': ['0.5 0.5 x 0.2']"),
        ("0 nan 0.5 0.2 0.2", "bbox is not four finite numbers"),
        ("7 0.5 0.5 0.2 0.2", "of a category that is not listed (annotation id 'a.txt:1': 7)"),
        ("cat 0.5 0.5 0.2 0.2", "of a category that is not listed (annotation id 'a.txt:1': 'cat')"),
        ("0 0.5 0.5 0 0.2", "bbox without width or height"),
        ("0 1.0 0.5 0.2 0.2", "bbox partly outside its image, clipped"),
    ],
)
def test_a_faulty_line_is_named_by_file_and_number(root: Path, line: str, expected: str) -> None:
    (root / "labels/train/a.txt").write_text(line)
    assert any(expected in finding.sentence() for finding in train_of(root).findings)


def test_labels_in_pixels_are_refused(root: Path) -> None:
    for name in ("a", "b"):
        (root / f"labels/train/{name}.txt").write_text("0 150 80 20 20\n")
    (finding,) = train_of(root).findings
    assert finding.outcome == "refused" and "labels look like pixels (2 of 2" in finding.what


def test_an_unreadable_picture_is_refused_by_name(root: Path) -> None:
    (root / "images/train/b.png").write_bytes(b"nothing")
    (finding, *_) = train_of(root).findings
    assert (finding.outcome, finding.count) == ("refused", 1)
    assert finding.examples[0].startswith("b.png: not an image")


def test_labels_refer_to_the_upright_picture(root: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (100, 50)).save(root / "images/val/d.jpg", exif=exif)
    (root / "images/val/d.png").unlink()
    found = read_split(locate_dataset(root))
    assert (found.images[0].width, found.images[0].height) == (50, 100)
    assert found.annotations[0].bbox_xywh == (0, 0, 50, 100)
    assert read_dataset_image(root / "images/val", found.images[0]).size == (50, 100)


def test_labels_lie_in_place_of_the_last_images_folder_or_beside_the_picture() -> None:
    assert label_file(Path("/images/set/images/train/a.b.jpg")) == Path("/images/set/labels/train/a.b.txt")
    assert label_file(Path("/set/train/a.jpg")) == Path("/set/train/a.txt")


def test_a_folder_that_is_not_there_is_named(root: Path) -> None:
    (root / "data.yaml").write_text("train: images/gone\nnames: [cat]\n")
    with pytest.raises(DatasetError, match=r"'train' is .*images/gone, not a folder of pictures"):
        read_split(locate_dataset(root, purpose="train"))
