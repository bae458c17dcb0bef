from __future__ import annotations

import pytest

from ddetr_cli.classes import COCO_NAMES, COCO_TABLE, ClassTable
from ddetr_cli.data.records import CocoCategory
from ddetr_cli.errors import DatasetError
from ddetr_cli.evaluate.mapping import map_classes

COCO = [CocoCategory(i, name) for i, name in COCO_NAMES.items()]


def categories(*pairs: tuple[int, str]) -> list[CocoCategory]:
    return [CocoCategory(*pair) for pair in pairs]


def test_equal_ids_and_names_need_no_mapping_whatever_their_order() -> None:
    mapping = map_classes(ClassTable((3, 7), ("a", "b")), categories((7, "b"), (3, "a")))
    assert mapping.is_identity
    assert mapping.category_ids == (3, 7)
    assert mapping.describe() == []


def test_a_coco_model_on_coco_data_keeps_its_unnamed_ids() -> None:
    mapping = map_classes(COCO_TABLE, COCO)
    assert mapping.is_identity
    assert mapping.category_ids == tuple(range(91))
    mapping.require(12)


def test_other_ids_are_mapped_by_name_and_the_mapping_is_told() -> None:
    mapping = map_classes(ClassTable((1, 2, 3), ("cat", "dog", "cow")), categories((18, "dog"), (17, "cat")))
    assert not mapping.is_identity
    assert mapping.category_ids == (17, 18, None)
    assert mapping.describe() == [
        'model class 0 "cat" -> category 17 "cat"',
        'model class 1 "dog" -> category 18 "dog"',
        "model classes without a counterpart: cow",
    ]


def test_the_same_ids_with_other_names_are_not_taken_for_the_same_classes() -> None:
    mapping = map_classes(ClassTable((1, 2), ("cat", "dog")), categories((1, "dog"), (2, "cat")))
    assert mapping.category_ids == (2, 1)


def test_a_predicted_class_without_counterpart_is_named() -> None:
    mapping = map_classes(ClassTable((1, 2), ("cat", "cow")), categories((17, "cat")))
    mapping.require(0)
    with pytest.raises(DatasetError, match=r"class 'cow': .*--map-missing drop"):
        mapping.require(1)


def test_names_may_differ_in_case_where_that_is_unambiguous() -> None:
    mapping = map_classes(ClassTable((1, 2), ("RBC", "WBC")), categories((5, "rbc"), (6, "wbc"), (7, "Wbc")))
    assert mapping.category_ids == (5, None)


def test_an_exact_name_wins_over_one_in_other_case() -> None:
    mapping = map_classes(ClassTable((1,), ("rbc",)), categories((5, "RBC"), (6, "rbc")))
    assert mapping.category_ids == (6,)


def test_no_common_class_at_all_is_refused() -> None:
    with pytest.raises(DatasetError, match="none of the data set's"):
        map_classes(COCO_TABLE, categories((1, "RBC")))


def test_a_name_that_belongs_to_two_categories_cannot_be_mapped() -> None:
    with pytest.raises(DatasetError, match=r"belongs to 2 categories \(ids 1, 2\)"):
        map_classes(ClassTable((5,), ("cell",)), categories((1, "cell"), (2, "cell")))


def test_of_two_categories_with_one_name_the_one_with_the_same_id_is_meant() -> None:
    table = ClassTable((1, 2), ("cell", "cell"))
    mapping = map_classes(table, categories((1, "cell"), (2, "cell"), (3, "egg")))
    assert mapping.category_ids == (1, 2)
