from __future__ import annotations

from pathlib import Path

from ddetr_cli.classes import COCO_NAMES, COCO_TABLE
from ddetr_cli.data.records import CocoAnnotation, CocoAnnotations, CocoCategory, CocoImage


def make(categories: tuple[CocoCategory, ...] = (CocoCategory(7, "a"), CocoCategory(3, "b"))) -> CocoAnnotations:
    images = tuple(CocoImage(i, f"{i}.jpg", 100, 100) for i in (1, 2, 3))
    boxes = tuple(CocoAnnotation(n, image, 7, (0, 0, 10, 10), 100, False) for n, image in ((1, 3), (2, 1), (3, 3)))
    return CocoAnnotations(Path("x.json"), images, boxes, categories)


def test_annotations_are_found_by_image_and_empty_images_have_none() -> None:
    by_image = make().by_image
    assert [a.id for a in by_image[3]] == [1, 3]
    assert by_image[2] == ()


def test_a_subset_keeps_only_its_images_and_their_annotations() -> None:
    full = make()
    part = full.subset(full.images[1:])
    assert [image.id for image in part.images] == [2, 3]
    assert [a.id for a in part.annotations] == [1, 3]
    assert len(full.annotations) == 3


def test_the_class_table_ranks_by_category_id_and_knows_coco() -> None:
    assert make().class_table().category_ids == (3, 7)
    coco = tuple(CocoCategory(i, name) for i, name in COCO_NAMES.items())
    assert make(coco).class_table() is COCO_TABLE
