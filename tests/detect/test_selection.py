from __future__ import annotations

import pytest
import torch

from ddetr_cli.classes import COCO_TABLE, ClassTable
from ddetr_cli.detect.selection import Selection, make_selection, parse_thresholds
from ddetr_cli.errors import UsageError
from ddetr_cli.inference.detections import ImageDetections

BOX, OTHER = (0.0, 0.0, 9.0, 9.0), (1.0, 0.0, 9.0, 9.0)


def found(*rows: tuple[float, int, tuple[float, float, float, float]]) -> ImageDetections:
    scores, labels, boxes = ([row[i] for row in rows] for i in range(3))
    return ImageDetections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels), dropped=4)


FOUND = found((0.9, 1, BOX), (0.7, 0, BOX), (0.5, 2, OTHER), (0.4, 1, OTHER), (0.25, 0, OTHER))


def kept(selection: Selection) -> list[tuple[float, int]]:
    chosen = selection(FOUND)
    assert chosen.dropped == 4
    assert len(chosen.boxes_xyxy_px) == len(chosen.scores)
    return [
        (round(score, 6), label) for score, label in zip(chosen.scores.tolist(), chosen.labels.tolist(), strict=True)
    ]


def test_a_score_at_the_threshold_is_kept() -> None:
    assert kept(Selection(0.5)) == [(0.9, 1), (0.7, 0), (0.5, 2)]
    assert len(kept(Selection(0.0))) == 5
    assert kept(Selection(1.0)) == []


def test_a_class_may_have_its_own_threshold_above_or_below() -> None:
    assert kept(Selection(0.5, {0: 0.25, 1: 0.95})) == [(0.7, 0), (0.5, 2), (0.25, 0)]


def test_only_chosen_classes_are_kept() -> None:
    assert kept(Selection(0.0, classes=frozenset({0, 2}))) == [(0.7, 0), (0.5, 2), (0.25, 0)]


def test_the_best_few_are_those_of_what_is_left() -> None:
    assert kept(Selection(0.0, top=2)) == [(0.9, 1), (0.7, 0)]
    assert kept(Selection(0.0, classes=frozenset({0}), top=2)) == [(0.7, 0), (0.25, 0)]
    assert len(kept(Selection(0.0, top=99))) == 5


def test_a_box_has_its_best_class_only_also_where_that_class_is_not_asked_for() -> None:
    assert kept(Selection(0.0, one_class_per_box=True)) == [(0.9, 1), (0.5, 2)]
    assert kept(Selection(0.0, classes=frozenset({0}), one_class_per_box=True)) == []


NEAR = (0.0, 0.0, 9.0, 8.9)


def test_of_boxes_of_one_class_that_overlap_the_best_is_kept_also_where_others_come_between() -> None:
    twice = found((0.9, 1, BOX), (0.8, 0, NEAR), (0.7, 1, NEAR), (0.6, 1, (20.0, 0.0, 29.0, 9.0)), (0.5, 0, BOX))
    assert Selection(0.0, nms=0.7)(twice).scores.tolist() == pytest.approx([0.9, 0.8, 0.6])
    assert Selection(0.0, nms=0.7, top=2)(twice).scores.tolist() == pytest.approx([0.9, 0.8])
    assert Selection(0.0, nms=0.999)(twice).scores.tolist() == twice.scores.tolist()
    limits = Selection(0.5, {1: 0.65}, frozenset({1}), nms=0.7)
    assert limits(twice).scores.tolist() == pytest.approx([0.9])


def test_a_class_that_is_not_the_best_of_its_box_takes_no_part_in_suppression() -> None:
    twice = found((0.9, 1, BOX), (0.8, 1, NEAR), (0.7, 0, NEAR), (0.6, 0, BOX))
    assert Selection(0.0, one_class_per_box=True, nms=0.7)(twice).labels.tolist() == [1]
    assert Selection(0.0, nms=0.7)(twice).labels.tolist() == [1, 0]


def test_nothing_found_stays_nothing() -> None:
    nothing = ImageDetections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    chosen = Selection(0.0, {1: 0.5}, frozenset({1}), 3, one_class_per_box=True, nms=0.5)(nothing)
    assert chosen.boxes_xyxy_px.shape == (0, 4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], (0.5, {})),
        (["0.3"], (0.3, {})),
        (["0.3", "person=0.7", "1"], (1.0, {"person": 0.7})),
        (["person=0.7", "person=0.2"], (0.5, {"person": 0.2})),
        (["a=b=0.7"], (0.5, {"a=b": 0.7})),
    ],
)
def test_thresholds_are_one_for_all_and_some_by_class(
    values: list[str], expected: tuple[float, dict[str, float]]
) -> None:
    assert parse_thresholds(values, 0.5) == expected


@pytest.mark.parametrize("value", ["", "nan", "-0.1", "1.1", "x", "person=", "=0.5", "person=nan", "0.5=person"])
def test_what_is_no_score_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="not in the range 0 to 1"):
        parse_thresholds([value], 0.5)


def select(*wanted: str, classes: ClassTable = COCO_TABLE, **thresholds: float) -> Selection:
    return make_selection(classes, 0.5, thresholds, wanted or None, top=None, one_class_per_box=False)


def test_classes_are_named_by_name_in_any_capitals_or_by_id() -> None:
    assert select("person", "Traffic Light", "3").classes == {1, 10, 3}
    assert select(person=0.7, DOG=0.1).thresholds == {1: 0.7, 18: 0.1}
    assert select().classes is None


def test_a_name_goes_before_an_id_and_ids_may_be_text() -> None:
    table = ClassTable((1, 2, "c"), ("2", None, "x"))
    assert select("2", classes=table).classes == {0}
    assert select("c", "class 2", classes=table).classes == {2, 1}


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("persn", r"--classes 'persn': unknown \(the model has no such class\)\. Did you mean person\?"),
        ("Bicicle", "Did you mean bicycle"),
        ("zzzz", r"It has person, bicycle, car, .*, traffic light, \.\.\.\."),
        ("91", "unknown"),
    ],
)
def test_an_unknown_class_is_refused_with_the_closest_names(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        select("car", text)


def test_the_choice_is_on_record_by_category_id() -> None:
    table = ClassTable((5, 7), ("a", "b"))
    assert select("b", classes=table, a=0.25).to_json(table) == {
        "threshold": 0.5,
        "thresholds": [[5, 0.25]],
        "classes": [7],
        "top_k": None,
        "one_class_per_box": False,
        "nms": None,
    }
