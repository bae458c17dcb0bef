from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.detect.drawing import PALETTE, draw_detections

GREY = (128, 128, 128)


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return np.asarray((np.asarray(before) != np.asarray(after)).any(axis=-1))


def test_a_box_is_drawn_in_its_classes_colour_and_the_original_stays_as_it_was() -> None:
    image = picture(200, 200)
    drawn = draw_detections(image, [(50.0, 80.0, 150.0, 160.0)], [1], [0.9], ["dog"])
    assert not changed(picture(200, 200), image).any()
    for corner in ((50, 160), (150, 160), (150, 80)):
        assert drawn.getpixel(corner) == PALETTE[1]
    assert drawn.getpixel((100, 120)) == GREY
    assert drawn.getpixel((20, 120)) == GREY


def test_without_detections_the_picture_is_unchanged() -> None:
    assert not changed(picture(64, 48), draw_detections(picture(64, 48), [], [], [], [])).any()


def test_a_box_that_sticks_out_is_drawn_up_to_the_edge() -> None:
    drawn = draw_detections(picture(200, 200), [(-50.0, 100.0, 300.0, 400.0)], [0], [0.9], ["dog"])
    for point in ((0, 150), (199, 150), (100, 199)):
        assert drawn.getpixel(point) == PALETTE[0]


def test_a_box_wholly_outside_is_not_drawn() -> None:
    image = picture(100, 100)
    boxes = [
        (-50.0, 10.0, -10.0, 20.0),
        (110.0, 10.0, 120.0, 20.0),
        (10.0, -20.0, 20.0, -5.0),
        (10.0, 105.0, 20.0, 120.0),
    ]
    assert not changed(image, draw_detections(image, boxes, [0] * 4, [0.9] * 4, ["dog"] * 4)).any()


@pytest.mark.parametrize(
    "size", [(1, 1), (2, 2), (9, 9), (12, 12), (1, 2000), (2000, 1), (6000, 40), (64, 48), (640, 480)]
)
def test_any_size_of_picture_and_of_box_can_be_drawn(size: tuple[int, int]) -> None:
    source = random.Random(0)
    boxes = []
    for _ in range(40):
        x, y = source.uniform(-0.2, 1.2) * size[0], source.uniform(-0.2, 1.2) * size[1]
        w, h = source.choice([0, 0.01, 0.3, 1.5]) * size[0], source.choice([0, 0.01, 0.3, 1.5]) * size[1]
        boxes.append((x, y, x + w, y + h))
    drawn = draw_detections(picture(*size), boxes, list(range(40)), [0.5] * 40, ["traffic light"] * 40)
    assert drawn.size == size


def test_a_box_of_no_size_is_still_a_dot() -> None:
    drawn = draw_detections(picture(20, 20), [(10.0, 10.0, 10.0, 10.0)], [0], [0.9], ["dog"])
    assert drawn.getpixel((10, 10)) == PALETTE[0]


def test_a_label_of_a_box_in_any_corner_stays_inside_the_picture() -> None:
    for x, y in ((0, 0), (380, 0), (0, 280), (380, 280)):
        image = picture(400, 300)
        box = (float(x), float(y), float(x + 20), float(y + 20))
        marks = changed(image, draw_detections(image, [box], [4], [0.87], ["person"]))
        # The letters are white on this blue, and none is cut off: the same number in every corner.
        drawn = np.asarray(draw_detections(image, [box], [4], [0.87], ["person"]))
        assert marks.sum() > 400
        letters = (drawn > 230).all(axis=-1).sum()
        middle = np.asarray(draw_detections(image, [(190.0, 140.0, 210.0, 160.0)], [4], [0.87], ["person"]))
        assert letters == (middle > 230).all(axis=-1).sum()


def test_labels_of_boxes_on_one_spot_do_not_cover_each_other() -> None:
    image = picture(600, 400)
    box = (200.0, 150.0, 400.0, 250.0)
    one = changed(image, draw_detections(image, [box], [0], [0.9], ["dog"])).sum()
    three = changed(image, draw_detections(image, [box] * 3, [0] * 3, [0.9] * 3, ["dog"] * 3)).sum()
    label = 45 * 15  # at least this much each
    assert three > one + 2 * label * 0.8


def test_letters_grow_with_the_picture() -> None:
    def label_rows(width: int, height: int) -> int:
        image = picture(width, height)
        box = (width * 0.4, height * 0.5, width * 0.6, height * 0.7)
        marks = changed(image, draw_detections(image, [box], [0], [0.9], ["dog"]))
        return int(marks[: round(height * 0.5) - 1].any(axis=1).sum())

    small, large = label_rows(640, 480), label_rows(6400, 4800)
    assert small >= 12
    assert 8 * small < large < 12 * small


def test_a_thumbnail_gets_boxes_without_labels() -> None:
    image = picture(24, 24)
    marks = changed(image, draw_detections(image, [(4.0, 12.0, 20.0, 20.0)], [0], [0.9], ["dog"]))
    assert marks[12].any()
    assert not marks[:12].any()


@pytest.mark.parametrize("name", ["\x1b[31mred\x1b[0m", "a\nb", "Ärger", "猫", "x" * 10_000, "", "\u202egpj"])
def test_any_class_name_can_be_drawn_on_one_line(name: str) -> None:
    image = picture(640, 480)
    marks = changed(image, draw_detections(image, [(200.0, 200.0, 300.0, 300.0)], [0], [0.9], [name]))
    assert not marks[:170].any()  # one line above the box
    assert marks[180:200].any()


def test_no_metadata_of_the_original_is_left() -> None:
    image = picture(20, 20)
    image.info = {"exif": b"secret", "icc_profile": b"profile", "comment": b"text", "dpi": (72, 72)}
    assert draw_detections(image, [], [], [], []).info == {}


def test_colours_are_distinct_and_repeat_for_many_classes() -> None:
    assert len(set(PALETTE)) == 7
    drawn = draw_detections(picture(100, 100), [(10.0, 40.0, 90.0, 90.0)], [90], [0.9], ["toothbrush"])
    assert drawn.getpixel((10, 90)) == PALETTE[90 % 7]
