from __future__ import annotations

from pathlib import Path

import pytest

from ddetr_cli.data.layouts import find_splits, image_folder


def build(root: Path, *paths: str) -> None:
    """Empty files for names with a dot, folders for the others."""
    for path in paths:
        target = root / path
        (target.parent if "." in target.name else target).mkdir(parents=True, exist_ok=True)
        if "." in target.name:
            target.write_text("train: train/images\nval: valid/images\nnames: [a]\n")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (
            ["annotations/instances_train2017.json", "annotations/captions_train2017.json", "train2017"],
            {"train2017": ("coco", "train2017", "annotations/instances_train2017.json")},
        ),
        (["annotations/one.json", "images"], {"one": ("coco", "images", "annotations/one.json")}),
        (["one.json", "images"], {"one": ("coco", "images", "one.json")}),
        (["one.json", "1.jpg"], {"one": ("coco", "", "one.json")}),
        (
            ["train/_annotations.coco.json", "valid/_annotations.coco.json"],
            {
                "train": ("coco", "train", "train/_annotations.coco.json"),
                "valid": ("coco", "valid", "valid/_annotations.coco.json"),
            },
        ),
        (
            ["data.yaml", "train/images", "valid/images"],
            {"train": ("yolo", "train/images", "data.yaml"), "val": ("yolo", "valid/images", "data.yaml")},
        ),
        (["Annotations/1.xml", "JPEGImages"], {"all": ("voc", "JPEGImages", "Annotations")}),
        (["annotations/1.xml", "images"], {"all": ("voc", "images", "annotations")}),
        (["train/1.xml", "test/2.xml"], {"train": ("voc", "train", "train"), "test": ("voc", "test", "test")}),
        (["1.xml"], {"all": ("voc", "", "")}),
        (["1.jpg"], {}),
    ],
)
def test_every_way_to_keep_a_data_set_is_recognised(
    tmp_path: Path, paths: list[str], expected: dict[str, tuple[str, str, str]]
) -> None:
    build(tmp_path, *paths)
    found = {name: (s.layout, s.images, s.annotations) for name, s in find_splits(tmp_path).items()}
    assert found == {
        name: (layout, tmp_path / images, tmp_path / annotations)
        for name, (layout, images, annotations) in expected.items()
    }


def test_a_yaml_and_stray_json_files_make_a_yolo_set(tmp_path: Path) -> None:
    build(tmp_path, "data.yaml", "train/images", "valid/images", "notes.json")
    assert {split.layout for split in find_splits(tmp_path).values()} == {"yolo"}


def test_voc_lists_of_one_class_are_not_splits(tmp_path: Path) -> None:
    build(tmp_path, "Annotations/1.xml", "JPEGImages", "ImageSets/Main/train.txt", "ImageSets/Main/cat_train.txt")
    (split,) = find_splits(tmp_path).values()
    assert (split.split, split.listing) == ("train", tmp_path / "ImageSets/Main/train.txt")


def test_a_root_with_annotations_and_no_pictures_has_no_image_folder(tmp_path: Path) -> None:
    build(tmp_path, "annotations/val.json")
    assert image_folder(tmp_path, "val") is None
