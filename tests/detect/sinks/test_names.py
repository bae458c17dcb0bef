from __future__ import annotations

import os

import pytest

from ddetr_cli.detect.sinks.names import label_name, picture_name


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


@pytest.mark.parametrize(
    ("name", "labels"), [("a/b.jpg", "a/b.txt"), ("b.tar.png", "b.tar.txt"), ("noending", "noending.txt")]
)
def test_labels_have_the_name_of_the_picture_with_another_ending(name: str, labels: str) -> None:
    assert label_name(name) == labels
