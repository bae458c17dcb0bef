from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.errors import DatasetError
from ddetr_cli.evaluate.selection import listed_images

Truth = Callable[..., CocoAnnotations]
BOX = (1.0, 2.0, 3.0, 4.0)


def chosen(tmp_path: Path, truth: CocoAnnotations, text: str) -> list[int | str]:
    (tmp_path / "list.txt").write_text(text)
    return [image.id for image in listed_images(tmp_path / "list.txt", truth).images]


@pytest.mark.parametrize("text", ["3.jpg\n1.jpg", "./images/val2017/1.jpg\r\n\n/data/3.jpg\n", "1\n3", "3.jpg\n3\n1"])
def test_images_are_named_by_file_path_or_id_and_keep_their_order(tmp_path: Path, truth: Truth, text: str) -> None:
    ground_truth = truth((1, 1, BOX), (2, 1, BOX), (3, 1, BOX))
    assert chosen(tmp_path, ground_truth, text) == [1, 3]


def test_the_annotations_of_other_images_are_left_out(tmp_path: Path, truth: Truth) -> None:
    (tmp_path / "list.txt").write_text("2.jpg")
    found = listed_images(tmp_path / "list.txt", truth((1, 1, BOX), (2, 1, BOX)))
    assert [annotation.image_id for annotation in found.annotations] == [2]


def test_a_name_that_two_folders_have_is_taken_only_with_its_folder(tmp_path: Path, truth: Truth) -> None:
    ground_truth = truth((1, 1, BOX), (2, 1, BOX))
    images = [replace(image, file_name=f"{image.id}/a.jpg") for image in ground_truth.images]
    ground_truth = replace(ground_truth, images=tuple(images))
    assert chosen(tmp_path, ground_truth, "2/a.jpg") == [2]
    with pytest.raises(DatasetError, match=r"1 of 1 lines name no image of truth.json \(a.jpg\)"):
        chosen(tmp_path, ground_truth, "a.jpg")


@pytest.mark.parametrize(
    ("text", "expected"), [("", "an empty list"), ("\n \n", "an empty list"), ("1\nx\ny", r"2 of 3 lines .*\(x, y\)")]
)
def test_a_list_that_names_nothing_or_something_else_is_refused(
    tmp_path: Path, truth: Truth, text: str, expected: str
) -> None:
    with pytest.raises(DatasetError, match=expected):
        chosen(tmp_path, truth((1, 1, BOX)), text)
