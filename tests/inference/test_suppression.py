from __future__ import annotations

import numpy as np
import pytest

from ddetr_cli.errors import UsageError
from ddetr_cli.inference.suppression import check_nms, rows_without_overlaps

BOX = (0.0, 0.0, 10.0, 10.0)
HALF = (0.0, 0.0, 10.0, 5.0)  # IoU with BOX: 0.5


def rows(*boxes: tuple[float, float, float, float], iou: float = 0.5, labels: list[int] | None = None) -> list[int]:
    found: list[int] = rows_without_overlaps(boxes, labels or [0] * len(boxes), iou).tolist()
    return found


def test_of_two_boxes_of_one_class_the_first_stays() -> None:
    assert rows(BOX, HALF, BOX, iou=0.49) == [0]


def test_an_overlap_of_exactly_the_limit_is_no_more_than_it() -> None:
    assert rows(BOX, HALF, iou=0.5) == [0, 1]


def test_boxes_of_other_classes_do_not_count() -> None:
    assert rows(BOX, BOX, BOX, labels=[0, 1, 0]) == [0, 1]


def test_a_box_that_is_left_out_leaves_none_out_itself() -> None:
    shifted = [(3.0 * n, 0.0, 3.0 * n + 10, 10.0) for n in range(3)]  # neighbours share 7 of 13
    assert rows(*shifted, iou=0.5) == [0, 2]


def test_empty_boxes_overlap_nothing_and_no_boxes_are_none() -> None:
    point = (4.0, 4.0, 4.0, 4.0)
    assert rows(point, point, BOX, point) == [0, 1, 2, 3]
    assert rows_without_overlaps(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize("count", [1, 100, 256, 257, 900])
@pytest.mark.parametrize("iou", [0.1, 0.5, 0.7])
def test_it_leaves_what_torchvision_leaves(count: int, iou: float) -> None:
    torch = pytest.importorskip("torch")
    batched_nms = pytest.importorskip("torchvision.ops").batched_nms
    generator = torch.Generator().manual_seed(count)
    # Whole numbers, because torchvision moves the classes apart, which rounds others; few scores, so that many are
    # equal; and few places, so that many overlaps are.
    corners = torch.randint(0, 60, (count, 2), generator=generator).float()
    boxes = torch.cat([corners, corners + torch.randint(0, 30, (count, 2), generator=generator)], dim=1)
    scores = torch.randint(1, 9, (count,), generator=generator) / 8
    labels = torch.randint(0, 3, (count,), generator=generator)
    scores, order = scores.sort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    expected = batched_nms(boxes, scores, labels, iou).tolist()
    assert rows_without_overlaps(boxes, labels, iou).tolist() == expected
    assert count < 256 or len(expected) < count


@pytest.mark.parametrize("iou", [0.0, 1.0, -0.5, float("nan"), 70.0])
def test_a_limit_that_leaves_out_everything_or_nothing_is_refused(iou: float) -> None:
    with pytest.raises(UsageError, match="not between 0 and 1"):
        check_nms(iou)
