from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.data.pictures import check_images, image_path, inspect_images, read_dataset_image
from ddetr_cli.data.records import CocoAnnotation, CocoAnnotations, CocoCategory, CocoImage
from ddetr_cli.errors import DatasetError, ImageError


def dataset(count: int) -> CocoAnnotations:
    images = tuple(CocoImage(i, f"{i}.png", 64, 48) for i in range(count))
    boxes = tuple(CocoAnnotation(i + 1, i, 1, (0, 0, 10, 10), 100, False) for i in range(count))
    return CocoAnnotations(Path("x.json"), images, boxes, (CocoCategory(1, "a"),))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "a\0.jpg"])
def test_a_file_name_that_leads_out_of_the_image_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="leads outside the image folder"):
        image_path(tmp_path, CocoImage(1, name, 64, 48))


def test_a_file_name_in_a_sub_folder_is_fine(tmp_path: Path) -> None:
    assert image_path(tmp_path, CocoImage(1, "train/a b.jpg", 64, 48)) == tmp_path / "train/a b.jpg"


def test_missing_images_are_refused_listing_five_and_the_count(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "0.png")
    with pytest.raises(
        DatasetError, match=r"7 of 8 images: picture file is missing \(1.png, 2.png, 3.png, 4.png, 5.png, ...\)"
    ):
        check_images(dataset(8), tmp_path)


def test_missing_images_are_skipped_and_counted_on_request(tmp_path: Path, photo: Image.Image) -> None:
    for index in (0, 2):
        photo.save(tmp_path / f"{index}.png")
    kept = check_images(dataset(3), tmp_path, skip_missing=True, max_bad=0.5)
    assert kept.repairs == ("x.json: 1 of 3 images dropped: picture file is missing (1.png).",)
    assert [image.id for image in kept.images] == [0, 2]
    assert [annotation.image_id for annotation in kept.annotations] == [0, 2]


def test_nothing_but_missing_images_is_refused_even_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="3 of 3 images"):
        check_images(dataset(3), tmp_path, skip_missing=True, max_bad=1)


def save_turned(path: Path, stored: Image.Image) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned a quarter clockwise
    stored.save(path, exif=exif)


def test_a_turned_photo_is_read_as_stored_where_the_annotations_say_so(tmp_path: Path, photo: Image.Image) -> None:
    save_turned(tmp_path / "0.png", photo)
    image = read_dataset_image(tmp_path, CocoImage(0, "0.png", 64, 48))
    assert np.array_equal(np.asarray(image), np.asarray(photo))


def test_a_turned_photo_is_read_upright_where_only_that_fits_the_annotations(
    tmp_path: Path, photo: Image.Image
) -> None:
    save_turned(tmp_path / "0.png", photo)
    image = read_dataset_image(tmp_path, CocoImage(0, "0.png", 48, 64))
    assert np.array_equal(np.asarray(image), np.asarray(photo.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("size", [(48, 64), (65, 48)])
def test_a_picture_of_another_size_than_annotated_is_refused(
    tmp_path: Path, photo: Image.Image, size: tuple[int, int]
) -> None:
    photo.save(tmp_path / "0.png")
    with pytest.raises(DatasetError, match=f"64x48 px, but its annotations say {size[0]}x{size[1]}"):
        read_dataset_image(tmp_path, CocoImage(0, "0.png", *size))


def test_an_unreadable_picture_is_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ImageError, match="empty"):
        read_dataset_image(tmp_path, CocoImage(0, "0.png", 64, 48))


def test_a_yolo_picture_is_read_upright_even_where_its_stored_size_fits(tmp_path: Path, photo: Image.Image) -> None:
    square = photo.resize((48, 48))
    save_turned(tmp_path / "0.png", square)
    image = read_dataset_image(tmp_path, CocoImage(0, "0.png", 48, 48, is_upright=True))
    assert np.array_equal(np.asarray(image), np.asarray(square.transpose(Image.Transpose.ROTATE_270)))


def test_a_header_shows_a_picture_of_another_size_and_one_that_is_turned(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "0.png")
    save_turned(tmp_path / "1.png", photo)
    listed = dataset(2)
    found = inspect_images(
        replace(listed, images=tuple(replace(i, width=48, height=64) for i in listed.images)), tmp_path
    )
    assert [(f.outcome, f.examples) for f in found.findings] == [
        ("refused", ("0.png: 64x48, annotated as 48x64",)),
        ("repaired", ("1.png",)),
    ]
    assert [image.id for image in found.images] == [1]


def test_pixels_are_decoded_where_that_is_asked_for(tmp_path: Path, photo: Image.Image) -> None:
    for index in (0, 1):
        photo.save(tmp_path / f"{index}.png")
        content = (tmp_path / f"{index}.png").read_bytes()
        (tmp_path / f"{index}.png").write_bytes(content[: len(content) // 2])
    assert inspect_images(dataset(2), tmp_path).findings == ()
    (finding,) = inspect_images(dataset(2), tmp_path, decode=[1]).findings
    assert finding.examples[0].startswith("1.png: ")
    assert (finding.count, finding.what) == (1, "picture file cannot be read")


def test_every_picture_is_reported_as_looked_at(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "0.png")
    seen: list[int] = []
    inspect_images(dataset(3), tmp_path, on_image=lambda: seen.append(1))
    assert len(seen) == 3
