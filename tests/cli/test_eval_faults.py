"""What must not make a score wrong: results files and models that are broken, cut short or full of odd numbers.

Faults of annotation files are in test_annotation_faults.py. Each kind of fault is a row here or there:

annotations that are no JSON, in another encoding, without a key    "empty" to "no info" there
annotation ids missing, equal or from 0                             "ids ..." there; area, iscrowd and ids here
image ids and names twice, text, huge, mixed                        "image id twice" to "mixed ids" there
area or iscrowd missing, iscrowd as text                            "no area" to "iscrowd yes" there
boxes of no numbers, NaN, no size, outside, corners                 "bbox ..." to "xyxy" there
pictures of another size, turned, missing, unreadable, elsewhere    "other size" to "path absolute" there
nothing but crowds, odd classes, 5000 objects                       "background" to "5000 objects" there
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.cli.app import main
from ddetr_cli.data.records import CocoImage
from ddetr_cli.evaluate.run import ImageResult
from ddetr_cli.evaluate.table import Detection

NAN, INFINITY = float("nan"), float("inf")
Document = dict[str, Any]


def truth(images: int = 10) -> Document:
    """One object of 60x80 in each picture."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, images + 1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [10 * i, 20, 60, 80], "area": 4800, "iscrowd": 0}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": 1, "name": "a"}],
    }


def perfect(document: Document) -> list[dict[str, Any]]:
    """Every object found exactly."""
    return [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in document["annotations"]
    ]


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """(exit code, metrics.json) of results against annotations, with more options."""

    def run(results: Any, document: Document, *options: str) -> tuple[int, dict[str, Any]]:
        (tmp_path / "truth.json").write_text(json.dumps(document))
        (tmp_path / "results.json").write_text(json.dumps(results))
        files = ["--annotations", str(tmp_path / "truth.json"), "--predictions", str(tmp_path / "results.json")]
        out = tmp_path / "out"
        code = main(["eval", *files, "-o", str(out), "--overwrite", *options])
        return code, json.loads((out / "metrics.json").read_text()) if code == 0 else {}

    return run


Score = Callable[..., tuple[int, dict[str, Any]]]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bbox": [NAN] * 4}, "not four finite numbers"),
        ({"bbox": [0, 0, INFINITY, 5]}, "not four finite numbers"),
        ({"score": NAN}, "not a finite number"),
        ({"score": -INFINITY}, "not a finite number"),
        ({"bbox": [0, 0, -60, -80]}, "of negative size"),
        ({"bbox": [0, 0, 1e300, 1e300]}, "of infinite area"),
    ],
)
def test_a_detection_that_pycocotools_would_count_as_perfect_is_refused(
    score: Score, capsys: pytest.CaptureFixture[str], values: dict[str, Any], says: str
) -> None:
    document = truth()
    results = perfect(document)
    results[3] |= values
    assert score(results, document)[0] == 6
    assert f"detection 3 has {next(iter(values))}" in (said := capsys.readouterr().err)
    assert says in said


@pytest.mark.parametrize("evaluator", ["fast", "pycocotools"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, i: a.update(id=i), "ids 0, renumbered from 1"),
        (lambda a, i: a.update(iscrowd="0"), "iscrowd written as a string"),
        (lambda a, i: a.pop("area"), "area missing, filled with w*h"),
        (lambda a, i: a.pop("iscrowd"), "iscrowd missing, filled with 0"),
    ],
    ids=["ids from 0", "iscrowd text", "no area", "no iscrowd"],
)
def test_what_makes_pycocotools_wrong_is_repaired_and_told(
    score: Score,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Document, int], object],
    says: str,
    evaluator: str,
) -> None:
    document = truth()
    results = perfect(document)
    for index, annotation in enumerate(document["annotations"]):
        change(annotation, index)
    code, found = score(results, document, "--evaluator", evaluator)
    assert (code, found["AP"]) == (0, pytest.approx(1))
    assert says in capsys.readouterr().err


def test_what_a_model_gives_that_is_not_finite_is_left_out_counted_and_exits_3(
    tmp_path: Path, model: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = truth(1)
    document["images"][0] |= {"file_name": "a.jpg", "width": 64, "height": 48}
    document["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog\x1b[31m"}]
    (tmp_path / "truth.json").write_text(json.dumps(document))

    def damaged(*_: Any, **__: Any) -> Iterator[ImageResult]:
        image = CocoImage(1, "a.jpg", 64, 48)
        yield ImageResult(image, [Detection(1, 1, (10.0, 20.0, 60.0, 80.0), 0.9)], non_finite=7)

    monkeypatch.setattr("ddetr_cli.evaluate.run.predict_images", damaged)
    out = tmp_path / "out"
    files = ["--annotations", str(tmp_path / "truth.json"), "--images", str(photos), "-o", str(out)]
    assert main(["eval", *files, "-m", model, "--device", "cpu"]) == 3
    assert "7 detections were NaN or infinite and are left out" in capsys.readouterr().err
    assert len(json.loads((out / "detections.json").read_text())) == 1
    assert json.loads((out / "metrics.json").read_text())["AP"] == pytest.approx(1)


def test_more_than_100_detections_of_an_image_and_class_are_cut_and_that_is_told(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The photo with 279 trees: even perfect results reach 100 of them only."""
    file = data_dir / "photos/annotations/trees.json"
    (tmp_path / "results.json").write_text(json.dumps(perfect(json.loads(file.read_text()))))
    files = ["--annotations", str(file), "--predictions", str(tmp_path / "results.json")]
    assert main(["eval", *files, "-o", str(tmp_path / "out")]) == 0
    assert "detections past the 100 best of their image and class are not scored" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/metrics.json").read_text())["AR100"] < 1


def test_the_order_of_files_changes_nothing(score: Score) -> None:
    document = truth()
    results = perfect(document)
    for index, row in enumerate(results):
        row["score"] = 0.9 - 0.05 * index
        row["bbox"] = [row["bbox"][0] + 3 * index, *row["bbox"][1:]]
    _, first = score(results, document, "--per-class")
    shuffle = random.Random(0).shuffle
    for rows in (results, document["images"], document["annotations"]):
        shuffle(rows)
    assert score(results, document, "--per-class") == (0, first)


def test_a_size_that_does_not_occur_is_null_and_na(score: Score, capsys: pytest.CaptureFixture[str]) -> None:
    document = truth()
    code, found = score(perfect(document), document, "--bootstrap", "10")
    assert (code, found["APs"], found["ARl"], found["intervals"]["APs"]) == (0, None, None, None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["APs", "0.50:0.95", "small", "100", "n/a", "n/a"] in lines


@pytest.mark.parametrize(("kept", "code"), [(10, 0), (9, 0), (8, 6), (1, 6)])
def test_results_that_leave_out_more_than_a_tenth_of_the_images_are_refused(
    score: Score, capsys: pytest.CaptureFixture[str], kept: int, code: int
) -> None:
    document = truth()
    results = perfect(document)[:kept]
    assert score(results, document)[0] == code
    if code:
        expected = f"nothing was found in {10 - kept} of the 10 images that hold objects"
        assert expected in capsys.readouterr().err
        assert score(results, document, "--allow-partial")[0] == 0


def test_images_without_objects_need_no_detections(score: Score) -> None:
    document = truth()
    results = perfect(document)[:2]
    document["annotations"] = document["annotations"][:2]
    code, found = score(results, document)
    assert (code, found["AP"]) == (0, pytest.approx(1))
