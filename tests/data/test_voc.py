from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ddetr_cli.data.annotations import inspect_split, read_split
from ddetr_cli.data.locate import locate_dataset
from ddetr_cli.data.pictures import check_images, inspect_images
from ddetr_cli.data.records import CocoAnnotations


def xml(*objects: tuple[object, ...], size: tuple[object, object] = (100, 50), name: str = "x.png") -> str:
    """An annotation with (name, xmin, ymin, xmax, ymax[, difficult]) of each object."""
    body = "".join(
        f"<object><name>{label}</name><difficult>{rest[0] if rest else 0}</difficult><bndbox><xmin>{x0}</xmin>"
        f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for label, x0, y0, x1, y1, *rest in objects
    )
    return (
        f'<?xml version="1.0"?><annotation><filename>{name}</filename><size><width>{size[0]}</width>'
        f"<height>{size[1]}</height><depth>3</depth></size>{body}</annotation>"
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """VOC's own layout: a and b to train on, c to validate on; the dog is in c alone."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for stem in "abc":
        Image.new("RGB", (100, 50)).save(tmp_path / f"JPEGImages/{stem}.jpg")
    write(tmp_path, "a", xml(("cat", 1, 1, 100, 50), ("emu", 11, 11, 20, 30)))
    write(tmp_path, "b", xml(("cat", 5, 5, 50, 40, 1)))
    write(tmp_path, "c", xml(("dog", 2, 2, 10, 10)))
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("c\n")
    (tmp_path / "ImageSets/Main/cat_train.txt").write_text("a 1\nb -1\n")
    return tmp_path


def write(root: Path, stem: str, text: str) -> None:
    (root / f"Annotations/{stem}.xml").write_text(text)


def train_of(root: Path) -> CocoAnnotations:
    return inspect_split(locate_dataset(root, purpose="train"), purpose="train")


def test_objects_become_boxes_from_0_and_difficult_ones_crowds(root: Path) -> None:
    paths = locate_dataset(root, purpose="train")
    found = read_split(paths, purpose="train")
    assert [(i.id, i.file_name, i.width, i.height) for i in found.images] == [
        ("a", "a.jpg", 100, 50), ("b", "b.jpg", 100, 50),
    ]  # fmt: skip
    assert [(a.id, a.bbox_xywh, a.area, a.iscrowd) for a in found.annotations] == [
        ("a.xml:1", (0, 0, 100, 50), 5000, False),
        ("a.xml:2", (10, 10, 10, 20), 200, False),
        ("b.xml:1", (4, 4, 46, 36), 1656, True),
    ]
    assert found.repairs == ()
    assert paths.images is not None and check_images(found, paths.images).images == found.images


def test_all_splits_agree_on_the_classes(root: Path) -> None:
    paths = locate_dataset(root, purpose="train")
    assert paths.val is not None and paths.val == locate_dataset(root)
    train, val = read_split(paths, purpose="train"), read_split(paths.val)
    assert [(c.id, c.name) for c in train.categories] == [(1, "cat"), (2, "dog"), (3, "emu")]
    assert val.categories == train.categories
    assert [(a.image_id, a.category_id) for a in val.annotations] == [("c", 2)]


def test_a_set_with_a_coordinate_0_counts_from_0(root: Path) -> None:
    write(root, "a", xml(("cat", 0, 0, 100, 50)))
    assert read_split(locate_dataset(root, purpose="train"), purpose="train").annotations[0].bbox_xywh == (
        0,
        0,
        100,
        50,
    )


def test_pictures_may_lie_beside_their_files_in_a_folder_for_each_split(tmp_path: Path) -> None:
    for split, label in (("train", "cat"), ("valid", "dog"), ("test", "emu")):
        (tmp_path / split).mkdir()
        Image.new("RGB", (100, 50)).save(tmp_path / split / "a.png")
        (tmp_path / split / "a.xml").write_text(xml((label, 1, 1, 10, 10)))
    paths = locate_dataset(tmp_path, purpose="train")
    assert (paths.split, paths.images) == ("train", tmp_path / "train")
    assert paths.val is not None and paths.val.split == "valid"
    assert [c.name for c in read_split(paths, purpose="train").categories] == ["cat", "dog", "emu"]
    assert read_split(paths.val).annotations[0].category_id == 2


def test_a_folder_of_pictures_and_files_is_one_split(tmp_path: Path) -> None:
    for stem in "ab":
        Image.new("RGB", (100, 50)).save(tmp_path / f"{stem}.png")
    (tmp_path / "a.xml").write_text(xml(("cat", 1, 1, 10, 10)))
    found = read_split(locate_dataset(tmp_path, purpose="train"), purpose="train")
    assert [image.file_name for image in found.images] == ["a.png"]
    assert found.repairs == (f"{tmp_path}: 1 of 1 XML files: missing for a picture, which is left out (b.png).",)


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a.xml: line 1, column 1: not XML"),
        ("<annotation>\n<size></annotation>", "a.xml: line 2, column 9: not XML (mismatched tag)"),
        (BOMB, "a.xml: declares a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "a.xml: declares a document type"),
        (xml(("cat", 1, 1, "", 9)), "bbox is not four finite numbers (annotation id 'a.xml:1'"),
        (xml(("cat", 1, 1, "nan", 9)), "bbox is not four finite numbers (annotation id 'a.xml:1'"),
        (xml(("", 1, 1, 9, 9)), "category_id is neither integer nor string (annotation id 'a.xml:1')"),
        (xml(("cat", 9, 9, 5, 5)), "bbox without width or height"),
        (xml(("cat", 90, 9, 120, 30)), "bbox partly outside its image, clipped"),
        (xml(("cat", 1, 1, 9, 9), size=(0, 0)), "not a size in pixels (image 'a': 0.0x0.0)"),
    ],
)
def test_a_faulty_file_is_named(root: Path, text: str, expected: str) -> None:
    write(root, "a", text)
    assert any(expected in finding.sentence() for finding in train_of(root).findings), train_of(root).findings


def test_a_listed_picture_without_a_file_is_refused_by_name(root: Path) -> None:
    (root / "ImageSets/Main/train.txt").write_text("a\nz\n")
    (finding, *_) = train_of(root).findings
    assert (finding.outcome, finding.examples) == ("refused", ("z",))


def test_a_file_cannot_lead_out_of_the_image_folder(root: Path) -> None:
    (root / "JPEGImages/a.jpg").unlink()
    write(root, "a", xml(("cat", 1, 1, 9, 9), name="../../etc/passwd"))
    paths = locate_dataset(root, purpose="train")
    assert paths.images is not None
    assert any("leads outside" in f.what for f in inspect_images(read_split(paths), paths.images).findings)
