from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.errors import DatasetError
from ddetr_cli.train import splits
from ddetr_cli.train.options import TrainOptions
from ddetr_cli.train.splits import read_splits


def test_the_val_split_of_the_data_set_is_validated_on(squares: Path, watcher: type[Any]) -> None:
    train, val = read_splits(TrainOptions(Path("run"), data=squares), watcher())
    assert [split.annotations.path.name for split in (train, val)] == ["train.json", "val.json"]
    assert [len(split.annotations.images) for split in (train, val)] == [6, 2]


def test_without_a_val_split_every_tenth_image_is_held_out(
    tmp_path: Path, write_split: Callable[..., None], watcher: type[Any]
) -> None:
    write_split(tmp_path, "train", 21, seed=3)
    progress = watcher()
    train, val = read_splits(TrainOptions(Path("run"), data=tmp_path), progress)
    assert progress.warnings == [f"{tmp_path}: no val split: every tenth training image is held out (2 of 21)."]
    assert [image.file_name for image in val.annotations.images] == ["train9.png", "train19.png"]
    assert len(train.annotations.images) == 19
    assert not {image.id for image in train.annotations.images} & {image.id for image in val.annotations.images}


def test_a_test_split_is_never_touched(tmp_path: Path, write_split: Callable[..., None], watcher: type[Any]) -> None:
    write_split(tmp_path, "train", 10, seed=3)
    write_split(tmp_path, "test", 4, seed=4)
    train, val = read_splits(TrainOptions(Path("run"), data=tmp_path), watcher())
    assert {split.annotations.path.name for split in (train, val)} == {"train.json"}


def test_too_few_images_to_hold_any_out_are_refused(
    tmp_path: Path, write_split: Callable[..., None], watcher: type[Any]
) -> None:
    write_split(tmp_path, "train", 9, seed=3)
    with pytest.raises(DatasetError, match="9 images are too few"):
        read_splits(TrainOptions(Path("run"), data=tmp_path), watcher())


def test_a_wait_for_many_pictures_is_announced(
    squares: Path, watcher: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "MANY_PICTURES", 6)
    progress = watcher()
    read_splits(TrainOptions(Path("run"), data=squares), progress)
    assert progress.notes == ["reading the headers of 6 pictures"]


def test_classes_of_val_that_are_not_trained_on_are_named(
    tmp_path: Path, write_split: Callable[..., None], watcher: type[Any]
) -> None:
    write_split(tmp_path, "train", 6, seed=3)
    write_split(tmp_path, "val", 6, seed=4, names=("red", "green"))
    progress = watcher()
    read_splits(TrainOptions(Path("run"), data=tmp_path), progress)
    assert len(progress.warnings) == 1
    assert (
        "1 of 2 categories: of val are not among those trained on, their AP will be 0 (green)" in progress.warnings[0]
    )
