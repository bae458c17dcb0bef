from __future__ import annotations

from pathlib import Path

from ddetr_cli.data.coco import CocoAnnotation, CocoAnnotations, CocoCategory, CocoImage, hold_out


def dataset(count: int) -> CocoAnnotations:
    images = tuple(CocoImage(i, f"{i}.png", 64, 48) for i in range(count))
    boxes = tuple(CocoAnnotation(i + 1, i, 1, (0, 0, 10, 10), 100, False) for i in range(count))
    return CocoAnnotations(Path("x.json"), images, boxes, (CocoCategory(1, "a"),))


def test_every_tenth_image_is_held_out() -> None:
    kept, held = hold_out(dataset(25))
    assert [image.id for image in held.images] == [9, 19]
    assert len(kept.images) == 23
    assert {a.image_id for a in kept.annotations} == {image.id for image in kept.images}
    assert {a.image_id for a in held.annotations} == {9, 19}
