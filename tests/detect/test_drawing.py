from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.detect.drawing import PALETTE, draw_detections, label_name, spell

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
    for x, y in ((0, 0), (379, 0), (0, 279), (379, 279)):
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


def test_classes_beyond_the_palette_repeat_its_colours() -> None:
    drawn = draw_detections(picture(100, 100), [(10.0, 40.0, 90.0, 90.0)], [90], [0.9], ["toothbrush"])
    assert drawn.getpixel((10, 90)) == PALETTE[90 % len(PALETTE)]


# What each sees of linear RGB. Source: Machado, Oliveira and Fernandes, 2009, severity 1.
VISION = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


@pytest.mark.parametrize("vision", VISION)
def test_any_two_colours_look_different_under_every_common_colour_blindness(vision: str) -> None:
    values = np.array(PALETTE) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(VISION[vision]).T, 0, 1)
    ratio = seen @ np.array(XYZ).T / (0.95047, 1.0, 1.08883)
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    lab = np.stack((116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])), axis=1)
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1)
    assert distances[np.triu_indices(len(PALETTE), 1)].min() > 15


def test_letters_stand_out_from_every_colour_of_a_label() -> None:
    for label in range(len(PALETTE)):
        drawn = np.asarray(
            draw_detections(picture(640, 480), [(200.0, 200.0, 300.0, 300.0)], [label], [0.9], ["dog"])
        )
        chip = drawn[183:197, 203:230].reshape(-1, 3).astype(float) / 255
        linear = np.where(chip <= 0.04045, chip / 12.92, ((chip + 0.055) / 1.055) ** 2.4)
        luminance = np.sort(linear @ (0.2126, 0.7152, 0.0722))
        assert (luminance[-1] + 0.05) / (luminance[0] + 0.05) > 4.5  # WCAG 2, level AA


def boxes_of_a_crowd(width: int, height: int) -> list[tuple[float, float, float, float]]:
    source = random.Random(7)
    corners = [(source.uniform(0, width - 40), source.uniform(0, height - 40)) for _ in range(300)]
    return [(x, y, x + source.uniform(12, 60), y + source.uniform(12, 60)) for x, y in corners]


def test_in_a_crowd_no_label_covers_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageDraw

    chips: list[tuple[float, float, float, float]] = []
    rectangle = ImageDraw.ImageDraw.rectangle

    def note(self: ImageDraw.ImageDraw, xy: tuple[float, float, float, float], *args: object, **more: object) -> None:
        if more.get("fill") is not None:
            chips.append(xy)
        rectangle(self, xy, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", note)
    boxes = boxes_of_a_crowd(1000, 800)
    draw_detections(picture(1000, 800), boxes, [0] * 300, [0.9] * 300, ["tree"] * 300)
    assert 100 < len(chips) <= 300
    for index, (x0, y0, x1, y1) in enumerate(chips):
        assert 0 <= x0 < x1 < 1000
        assert 0 <= y0 < y1 < 800
        assert not any(x0 <= b[2] and b[0] <= x1 and y0 <= b[3] and b[1] <= y1 for b in chips[:index])


def test_in_a_crowd_labels_are_set_smaller_than_alone() -> None:
    def label_rows(boxes: list[tuple[float, float, float, float]]) -> int:
        image = picture(1600, 1200)
        drawn = draw_detections(image, boxes, [0] * len(boxes), [0.9] * len(boxes), ["tree"] * len(boxes))
        return int(changed(image, drawn)[500:599, 700:730].any(axis=1).sum())

    one = (700.0, 600.0, 730.0, 630.0)
    crowd = [(float(x), 1000.0, float(x + 30), 1030.0) for x in range(0, 1500, 50)]
    assert label_rows([one, *crowd]) < 0.6 * label_rows([one])


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("猫", "class 7"),
        ("Велосипед", "class 7"),
        ("Größe", "Größe"),
        ("cat 猫 or so", "cat 猫 or so"),
        ("what?", "what?"),
    ],
)
def test_a_name_in_letters_the_font_has_not_is_shown_as_its_id(name: str, label: str) -> None:
    assert label_name(name, 7) == label


def test_latin_letters_are_spelled_without_their_accents() -> None:
    assert spell("Größe Łódź smørrebrød 猫") == "Grosse Lodz smorrebrod ?"


def test_without_names_there_are_boxes_alone() -> None:
    image = picture(400, 300)
    marks = changed(image, draw_detections(image, [(100.0, 100.0, 300.0, 200.0)], [0], [0.9], None))
    assert not marks[:100].any()
    assert marks[100].any()
