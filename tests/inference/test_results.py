from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from ddetr_cli.inference.results import Box, Detection, Detections, coco_row

CAT = Detection("cat", 17, 0.123456789, Box(-3.25, 10.123456, 50.5, 40.0), 4)
DOG = Detection("dog", 18, 0.1, Box(1.0, 2.0, 3.0, 4.0), 5)


def test_detections_are_a_sequence() -> None:
    found = Detections((CAT, DOG), 64, 48)
    assert len(found) == 2
    assert found[0] is CAT
    assert found[-1:] == (DOG,)
    assert [one.label for one in found] == ["cat", "dog"]
    assert DOG in found


def test_a_box_can_be_taken_apart() -> None:
    x1, y1, x2, y2 = CAT.box
    assert (x1, y1, x2, y2) == (CAT.box.x1, CAT.box.y1, CAT.box.x2, CAT.box.y2)


def test_results_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CAT.score = 1.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Detections((CAT,), 64, 48).items = ()  # type: ignore[misc]


def test_coco_rows_have_corner_and_size_and_no_more_digits_than_float32_holds() -> None:
    assert Detections((CAT,), 64, 48).to_coco(7) == [
        {"image_id": 7, "category_id": 17, "bbox": [-3.25, 10.1235, 53.75, 29.8765], "score": 0.123456789}
    ]


def test_a_score_that_is_not_finite_stays_as_it_is() -> None:
    assert coco_row(1, 1, (0, 0, 1, 1), float("inf"))["score"] == float("inf")


def test_results_can_be_used_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; from ddetr_cli import Box, Detection, Detections, DdetrError"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
