from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.data.annotations import read_annotations
from ddetr_cli.data.records import CocoAnnotations, CocoCategory
from ddetr_cli.evaluate.metrics import METRICS, evaluate_detections
from ddetr_cli.evaluate.predictions import read_predictions
from ddetr_cli.evaluate.table import Detection

Truth = Callable[..., CocoAnnotations]

A = (100.0, 100.0, 100.0, 100.0)  # large: 96 * 96 px is the border
B = (300.0, 100.0, 100.0, 100.0)
NOWHERE = (500.0, 400.0, 50.0, 50.0)

# Results file -> its ground truth, both below the folder of test data, and its key in golden.json.
GOLDEN = {
    "cocoapi100": "eval_golden/cocoapi100_gt.json",
    "sahi": "eval_golden/sahi_gt.json",
    "coco_val80/instances": "coco_val80/annotations/instances.json",
    "bccd/test": "bccd/annotations/test.json",
    "photos/trees": "photos/annotations/trees.json",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_twelve_numbers_of_published_results_are_reproduced(data_dir: Path, name: str) -> None:
    golden = json.loads((data_dir / "eval_golden/golden.json").read_text())["metrics"][name]
    truth = read_annotations(data_dir / GOLDEN[name])
    results = data_dir / "eval_golden" / f"{name.replace('/', '_')}_results.json"
    overall = evaluate_detections(truth, read_predictions([results], truth)).overall
    assert tuple(overall) == METRICS
    for metric, value in overall.items():
        if golden[metric] == -1:
            assert value is None
        else:
            assert value == pytest.approx(golden[metric], abs=1e-6)  # the golden numbers have six digits


@pytest.mark.parametrize("name", GOLDEN)
def test_published_results_score_the_same_to_the_last_bit_with_pycocotools(data_dir: Path, name: str) -> None:
    truth = read_annotations(data_dir / GOLDEN[name])
    found = read_predictions([data_dir / "eval_golden" / f"{name.replace('/', '_')}_results.json"], truth)
    assert evaluate_detections(truth, found) == evaluate_detections(truth, found, evaluator="pycocotools")


def test_perfect_detections_score_1_and_sizes_that_do_not_occur_score_nothing(truth: Truth) -> None:
    found = evaluate_detections(truth((1, 1, A), (2, 1, B)), [Detection(1, 1, A, 0.9), Detection(2, 1, B, 0.8)])
    expected = dict.fromkeys(METRICS, 1.0) | dict.fromkeys(("APs", "APm", "ARs", "ARm"))
    assert found.overall == pytest.approx(expected, abs=1e-12)
    assert (found.images, found.detections) == (2, 2)


def test_a_false_detection_between_two_true_ones_costs_what_it_must(truth: Truth) -> None:
    detections = [Detection(1, 1, A, 0.9), Detection(1, 1, NOWHERE, 0.8), Detection(1, 1, B, 0.7)]
    found = evaluate_detections(truth((1, 1, A), (1, 1, B)), detections).overall
    # Precision is 1 up to recall 0.50 (51 of 101 points), 2/3 beyond.
    assert found["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-12)
    assert found["AR1"] == pytest.approx(0.5)
    assert found["AR10"] == pytest.approx(1.0)


def test_a_box_that_fits_to_82_percent_counts_at_seven_of_ten_thresholds(truth: Truth) -> None:
    found = evaluate_detections(truth((1, 1, A)), [Detection(1, 1, (100, 100, 100, 82), 0.9)]).overall
    assert found["AP"] == pytest.approx(0.7, abs=1e-12)
    assert (found["AP50"], found["AP75"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found["AR100"] == pytest.approx(0.7)


def test_only_the_100_best_detections_of_an_image_count(truth: Truth) -> None:
    wrong = [Detection(1, 1, NOWHERE, 0.9)] * 100
    assert evaluate_detections(truth((1, 1, A)), [*wrong, Detection(1, 1, A, 0.1)]).overall["AP"] == 0
    assert evaluate_detections(truth((1, 1, A)), [*wrong[1:], Detection(1, 1, A, 0.1)]).overall[
        "AP"
    ] == pytest.approx(0.01)


def test_no_detections_at_all_score_0(truth: Truth) -> None:
    assert evaluate_detections(truth((1, 1, A)), []).overall["AP"] == 0


def test_a_crowd_is_neither_found_nor_a_mistake(truth: Truth) -> None:
    ground_truth = truth((1, 1, A), (1, 1, B, True))
    found = evaluate_detections(ground_truth, [Detection(1, 1, B, 0.9), Detection(1, 1, A, 0.8)]).overall
    assert found["AP"] == pytest.approx(1.0)


def test_classes_are_scored_apart_and_their_mean_is_the_whole(truth: Truth) -> None:
    ground_truth = truth((1, 1, A), (1, 2, B), categories=tuple(CocoCategory(i, f"class {i}") for i in (1, 2, 3)))
    found = evaluate_detections(ground_truth, [Detection(1, 1, A, 0.9)])
    assert {name: numbers["AP"] for name, numbers in found.per_class.items()} == {
        "class 1": pytest.approx(1.0),
        "class 2": 0,
        "class 3": None,  # does not occur, so it is no part of the mean
    }
    assert found.overall["AP"] == pytest.approx(0.5)
    assert set(found.per_class["class 1"]) == set(METRICS)


def test_a_class_scores_the_same_alone_as_among_others(data_dir: Path) -> None:
    truth = read_annotations(data_dir / "bccd/annotations/test.json")
    detections = read_predictions([data_dir / "eval_golden/bccd_test_results.json"], truth)
    together = evaluate_detections(truth, detections).per_class
    for category in truth.categories:
        alone = CocoAnnotations(
            truth.path, truth.images, tuple(a for a in truth.annotations if a.category_id == category.id), (category,)
        )
        assert evaluate_detections(alone, detections).overall == together[category.name]


def test_two_categories_of_one_name_are_told_apart_by_id(truth: Truth) -> None:
    categories = (CocoCategory(1, "cell"), CocoCategory(2, "cell"))
    found = evaluate_detections(truth((1, 1, A), (1, 2, B), categories=categories), [Detection(1, 2, B, 0.9)])
    assert {name: numbers["AP"] for name, numbers in found.per_class.items()} == {
        "cell (id 1)": 0,
        "cell (id 2)": pytest.approx(1.0),
    }


def test_detections_of_unlisted_categories_are_not_scored(truth: Truth) -> None:
    found = evaluate_detections(truth((1, 1, A)), [Detection(1, 1, A, 0.5), Detection(1, 12, A, 0.9)])
    assert found.overall["AP"] == pytest.approx(1.0)
    assert found.detections == 2


@pytest.mark.parametrize(
    "make", [lambda i: i, str, lambda i: i + 2**60, lambda i: str(i) if i % 2 else i, lambda i: i - 1]
)
def test_ids_of_any_kind_give_the_same_score(truth: Truth, make: Callable[[int], Any]) -> None:
    boxes = [(make(i), make(1 + i % 2), A if i % 3 else B) for i in range(1, 11)]
    detections = [Detection(*box, 0.9) for box in boxes]
    assert evaluate_detections(truth(*boxes), detections).overall["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_detection_that_is_not_finite_is_never_scored(truth: Truth, value: float) -> None:
    for detection in (Detection(1, 1, (value, value, value, value), 0.9), Detection(1, 1, A, value)):
        with pytest.raises(ValueError, match="not finite"):
            evaluate_detections(truth((1, 1, A)), [detection])


def test_nothing_is_printed(truth: Truth, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_detections(truth((1, 1, A)), [])
    assert capsys.readouterr() == ("", "")


def test_the_json_form_has_the_numbers_at_top_level(truth: Truth) -> None:
    found = evaluate_detections(truth((1, 1, A)), [Detection(1, 1, A, 0.9)])
    assert list(found.to_json()) == [*METRICS, "images", "detections"]
    assert found.to_json()["APs"] is None
    assert found.to_json(per_class=True)["per_class"]["class 1"]["AP50"] == pytest.approx(1.0)


# Annotation files that pycocotools scores wrongly or not at all (measured with 2.0.11).
def _ids_from_0(document: dict[str, Any]) -> None:
    for index, annotation in enumerate(document["annotations"]):
        annotation["id"] = index


def _one_id_for_all(document: dict[str, Any]) -> None:
    for annotation in document["annotations"]:
        annotation["id"] = 7


def _no_ids_areas_or_crowds(document: dict[str, Any]) -> None:
    for annotation in document["annotations"]:
        del annotation["id"], annotation["area"], annotation["iscrowd"]


def _crowds_as_strings(document: dict[str, Any]) -> None:
    for annotation in document["annotations"]:
        annotation["iscrowd"] = "0"


def _a_box_without_size(document: dict[str, Any]) -> None:
    document["annotations"].append({"id": 99, "image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 0], "area": 0})


def _nothing(document: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize(
    "spoil",
    [_nothing, _ids_from_0, _one_id_for_all, _no_ids_areas_or_crowds, _crowds_as_strings, _a_box_without_size],
)
def test_perfect_detections_score_1_on_files_that_needed_repair(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    document = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, 11)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [10 * i, 20, 60, 80], "area": 4800, "iscrowd": 0}
            for i in range(1, 11)
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    perfect = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in document["annotations"]
    ]  # type: ignore[index]
    spoil(document)
    (tmp_path / "truth.json").write_text(json.dumps(document))
    (tmp_path / "results.json").write_text(json.dumps(perfect))
    truth = read_annotations(tmp_path / "truth.json")
    found = evaluate_detections(truth, read_predictions([tmp_path / "results.json"], truth))
    assert found.overall["AP"] == pytest.approx(1.0)
