from __future__ import annotations

from pathlib import Path

import pytest

from ddetr_cli.data.locate import locate_dataset
from ddetr_cli.errors import UsageError


def build(root: Path, *paths: str) -> Path:
    """Empty files for names with a dot, folders for the others."""
    for path in paths:
        target = root / path
        if "." in target.name:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("{}")
        else:
            target.mkdir(parents=True, exist_ok=True)
    return root


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return build(
        tmp_path,
        "train2017",
        "val2017",
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        "annotations/captions_val2017.json",
        "annotations/person_keypoints_val2017.json",
    )


def test_a_coco_root_gives_val2017_to_eval(coco: Path) -> None:
    found = locate_dataset(coco)
    assert (found.images, found.annotations) == (coco / "val2017", coco / "annotations/instances_val2017.json")
    assert (found.split, found.val) == ("val2017", None)


def test_a_coco_root_gives_train2017_and_val2017_to_training(coco: Path) -> None:
    found = locate_dataset(coco, purpose="train")
    assert (found.images, found.split) == (coco / "train2017", "train2017")
    assert found.val is not None
    assert (found.val.images, found.val.split) == (coco / "val2017", "val2017")


def test_the_image_folder_of_a_coco_root_is_understood(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = locate_dataset(coco / "val2017")
    assert (found.images, found.split) == (coco / "val2017", "val2017")
    assert locate_dataset(coco / "train2017").split == "train2017"
    monkeypatch.chdir(coco / "val2017")
    assert locate_dataset(Path()).annotations == coco / "annotations/instances_val2017.json"


def test_an_image_folder_that_is_a_link_belongs_to_the_root_the_link_is_in(coco: Path) -> None:
    (coco / "val2017").rename(coco / "disk")
    (coco / "root").mkdir()
    (coco / "annotations").rename(coco / "root/annotations")
    (coco / "root/val2017").symlink_to("../disk")
    found = locate_dataset(coco / "root/val2017")
    assert (found.images, found.split) == (coco / "root/val2017", "val2017")


@pytest.mark.parametrize("split", ["val", "valid"])
def test_a_folder_with_images_and_annotations_is_understood(tmp_path: Path, split: str) -> None:
    build(tmp_path, "images", f"annotations/{split}.json", "annotations/train.json", "annotations/test.json")
    found = locate_dataset(tmp_path)
    assert (found.images, found.annotations) == (tmp_path / "images", tmp_path / f"annotations/{split}.json")
    trained = locate_dataset(tmp_path, purpose="train")
    assert trained.split == "train"
    assert trained.val == found


def test_images_may_lie_in_a_folder_per_split(tmp_path: Path) -> None:
    build(tmp_path, "images/train", "images/val", "annotations/train.json", "annotations/val.json")
    assert locate_dataset(tmp_path).images == tmp_path / "images/val"
    assert locate_dataset(tmp_path, purpose="train").images == tmp_path / "images/train"


def test_a_named_split_wins_and_test_is_used_only_then(tmp_path: Path) -> None:
    build(tmp_path, "images", "annotations/test.json", "annotations/train.json")
    assert locate_dataset(tmp_path, split="test").annotations == tmp_path / "annotations/test.json"
    with pytest.raises(UsageError, match="Choose --split from: test, train"):
        locate_dataset(tmp_path)
    assert locate_dataset(tmp_path, purpose="train").val is None


def test_the_only_annotation_file_is_taken_unless_it_is_a_test_split(tmp_path: Path) -> None:
    build(tmp_path / "one", "images", "annotations/instances.json")
    for purpose in ("train", "eval"):
        assert locate_dataset(tmp_path / "one", purpose=purpose).split == "instances"
    build(tmp_path / "two", "images", "annotations/test.json")
    with pytest.raises(UsageError, match="Choose --split from: test"):
        locate_dataset(tmp_path / "two")


def test_training_never_takes_the_validation_split_by_itself(tmp_path: Path) -> None:
    build(tmp_path, "images", "annotations/val.json")
    with pytest.raises(UsageError, match="no split called train2017 or train"):
        locate_dataset(tmp_path, purpose="train")
    assert locate_dataset(tmp_path, purpose="train", split="val").val is None


def test_an_unknown_split_lists_the_choices(coco: Path) -> None:
    with pytest.raises(UsageError, match=r"no split 'dev'\. Choose --split from: train2017, val2017"):
        locate_dataset(coco, split="dev")


def test_explicit_paths_are_used_as_given(tmp_path: Path) -> None:
    build(tmp_path, "pictures", "truth.json")
    found = locate_dataset(None, images=tmp_path / "pictures", annotations=tmp_path / "truth.json")
    assert (found.images, found.annotations, found.split) == (tmp_path / "pictures", tmp_path / "truth.json", "truth")
    assert locate_dataset(None, annotations=tmp_path / "truth.json").images is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    build(tmp_path, "truth.json", "empty")
    for options, expected in (
        ({"data": None}, "DATA: not given"),
        ({"data": tmp_path / "gone"}, "not an existing folder"),
        ({"data": tmp_path / "truth.json"}, "the file as --annotations"),
        ({"data": tmp_path / "empty"}, "no annotations found"),
        ({"data": None, "annotations": tmp_path / "gone.json"}, "no such annotation file"),
        ({"data": None, "images": tmp_path / "gone", "annotations": tmp_path / "truth.json"}, "--images is not"),
    ):
        with pytest.raises(UsageError, match=expected):
            locate_dataset(**options)
