from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.classes import COCO_NAMES
from ddetr_cli.data.records import CocoAnnotations, CocoCategory
from ddetr_cli.errors import DatasetError
from ddetr_cli.evaluate.predictions import read_predictions
from ddetr_cli.evaluate.table import Detection

Truth = Callable[..., CocoAnnotations]
BOX = (10.0, 20.0, 30.0, 40.0)


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def row(**changes: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "bbox": list(BOX), "score": 0.5} | changes


def test_a_results_file_is_read_unchanged(tmp_path: Path, truth: Truth) -> None:
    file = write(tmp_path / "r.json", [row(), row(score=1), row(bbox=[-5, 0.25, 7, 8], segmentation=[])])
    assert list(read_predictions([file], truth((1, 1, BOX)))) == [
        Detection(1, 1, BOX, 0.5),
        Detection(1, 1, BOX, 1.0),
        Detection(1, 1, (-5.0, 0.25, 7.0, 8.0), 0.5),
    ]


def test_an_empty_list_is_a_result(tmp_path: Path, truth: Truth) -> None:
    assert list(read_predictions([write(tmp_path / "r.json", [])], truth((1, 1, BOX)))) == []


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"annotations": [row()]}, "not a list of detections"),
        ("text", "not a list of detections"),
        ([row(bbox=[NAN] * 4)], "detection 0 has bbox .*nan.*, not four finite numbers"),
        ([row(), row(bbox=[0, 0, INFINITY, INFINITY])], "detection 1 has bbox"),
        ([row(bbox=[1, 2, 3])], "not four finite numbers"),
        ([row(bbox=None)], "not four finite numbers"),
        ([row(bbox=[0, 0, -3, 5])], "of negative size"),
        ([row(bbox=[0, 0, 1e200, 1e200])], "of infinite area"),
        ([row(inner=row())], r"detections inside of detections \(2 in 1 entries\)"),
        ([row() | {"category_id": None}], "neither integer nor string"),
        ([row(), {k: v for k, v in row().items() if k != "bbox"}], "detection 1 has no 'bbox'"),
        ([row(score=NAN)], "detection 0 has score nan, not a finite number"),
        ([row(score="0.9")], "detection 0 has score '0.9'"),
        ([row(score=True)], "detection 0 has score True"),
        ([{k: v for k, v in row().items() if k != "score"}], "detection 0 has no 'score'"),
        ([row(image_id=None)], "neither integer nor string"),
        ([3], "detection 0 is not an object"),
        ([row(image_id=999), row(image_id=999), row()], r"2 of 3 detections have image ids .* \(999\)"),
        ([row(image_id="1")], r"image ids .* \('1'\)"),
        ([row(category_id=99)], r"1 of 1 detections have category ids that truth.json does not list \(99\)"),
    ],
)
def test_what_must_not_be_scored_is_refused(tmp_path: Path, truth: Truth, content: Any, expected: str) -> None:
    file = write(tmp_path / "r.json", content)
    with pytest.raises(DatasetError, match=expected) as caught:
        read_predictions([file], truth((1, 1, BOX)))
    assert str(caught.value).startswith(str(file))


def test_unnamed_ids_of_a_coco_model_are_no_other_data_set(tmp_path: Path, truth: Truth) -> None:
    coco = truth((1, 1, BOX), categories=tuple(CocoCategory(i, name) for i, name in COCO_NAMES.items()))
    assert len(read_predictions([write(tmp_path / "r.json", [row(category_id=12)])], coco)) == 1
    with pytest.raises(DatasetError, match="category ids"):
        read_predictions([write(tmp_path / "r.json", [row(category_id=91)])], coco)


def test_parts_of_one_result_are_put_together_in_their_order(tmp_path: Path, truth: Truth) -> None:
    ground_truth = truth((1, 1, BOX), (2, 1, BOX))
    parts = [write(tmp_path / "a.json", [row(image_id=2)]), write(tmp_path / "b.json", [row(), row(score=0.25)])]
    found = read_predictions(parts, ground_truth)
    assert [(d.image_id, d.score) for d in found] == [(2, 0.5), (1, 0.5), (1, 0.25)]


def test_an_image_in_two_parts_is_refused(tmp_path: Path, truth: Truth) -> None:
    parts = [write(tmp_path / "a.json", [row()]), write(tmp_path / "b.json", [row(score=0.25)])]
    with pytest.raises(DatasetError, match=r"b.json: has detections of image 1, as .*a.json has"):
        read_predictions(parts, truth((1, 1, BOX)))


def test_what_else_a_row_holds_is_passed_over(tmp_path: Path, truth: Truth) -> None:
    file = write(tmp_path / "r.json", [row(segmentation={"size": [1, 2], "counts": "x"}, extra=[{"a": 1}])])
    assert len(read_predictions([file], truth((1, 1, BOX)))) == 1
