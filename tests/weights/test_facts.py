from __future__ import annotations

import pytest

from ddetr_cli.classes import COCO_NAMES, COCO_TABLE
from ddetr_cli.weights.facts import class_table


def _labels(names: list[str]) -> dict[str, dict[str, str]]:
    return {"id2label": {str(index): name for index, name in enumerate(names)}}


@pytest.mark.parametrize(
    "facts",
    [
        {},
        _labels([f"LABEL_{index}" for index in range(91)]),
        _labels([COCO_NAMES.get(index, "N/A") for index in range(91)]),
        _labels([COCO_NAMES.get(index, "a name for what COCO left out") for index in range(91)]),
    ],
    ids=["no names", "placeholders", "COCO's names", "COCO's and more"],
)
def test_91_outputs_are_cocos_unless_names_tell_otherwise(facts: dict[str, dict[str, str]]) -> None:
    assert class_table(91, facts, is_contiguous=False) == COCO_TABLE


def test_91_classes_of_somebody_elses_keep_their_names_though_one_is_also_cocos() -> None:
    names = [f"part {index}" for index in range(90)] + ["car"]
    table = class_table(91, _labels(names), is_contiguous=False)
    assert table.names == tuple(names)
    assert table.category_ids == tuple(range(91))
