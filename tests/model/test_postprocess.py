from __future__ import annotations

import math

import pytest
import torch

from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.model.faster_rcnn import SuppressedOutput
from ddetr_cli.model.postprocess import copy_at_once, decode, postprocess, postprocess_softmax
from ddetr_cli.presets import DEFORMABLE_DETR, DETR, FASTER_RCNN


def test_detections_equal_the_authors_numbers(golden):
    numbers = golden("postprocess")
    results = postprocess(numbers["logits"], numbers["boxes"], numbers["sizes_hw"])
    for image, result in enumerate(results):
        torch.testing.assert_close(result.scores, numbers["scores"][image], rtol=0, atol=1e-9)
        assert torch.equal(result.labels, numbers["labels"][image])
        torch.testing.assert_close(result.boxes_xyxy_px, numbers["boxes_xyxy_px"][image], rtol=0, atol=1e-9)


def test_one_query_can_appear_with_several_labels():
    logits = torch.tensor([[[2.0, 1.0, -9.0], [-9.0, -9.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]]])
    (result,) = postprocess(logits, boxes, [(100, 200)], top=3)
    assert result.labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(result.scores, torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    expected = torch.tensor([[80.0, 30, 120, 70], [80, 30, 120, 70], [0, 50, 100, 100]])
    torch.testing.assert_close(result.boxes_xyxy_px, expected)


@pytest.mark.parametrize(("queries", "classes", "expected"), [(3, 2, 6), (10, 10, 100), (300, 91, 100), (1, 1, 1)])
def test_an_image_has_at_most_queries_times_classes_rows(queries: int, classes: int, expected: int):
    (result,) = postprocess(torch.randn(1, queries, classes), torch.rand(1, queries, 4), [(10, 10)])
    assert len(result.scores) == len(result.labels) == len(result.boxes_xyxy_px) == expected


def test_boxes_are_not_clipped_to_the_image():
    (result,) = postprocess(torch.zeros(1, 1, 1), torch.tensor([[[0.0, 1.0, 1.0, 1.0]]]), [(50, 80)])
    assert result.boxes_xyxy_px.tolist() == [[-40.0, 25.0, 40.0, 75.0]]


def test_each_image_is_scaled_by_its_own_size():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]).expand(2, -1, -1)
    first, second = postprocess(torch.zeros(2, 1, 1), boxes, torch.tensor([[30, 40], [7, 9]]))
    assert first.boxes_xyxy_px.tolist() == [[0.0, 0.0, 40.0, 30.0]]
    assert second.boxes_xyxy_px.tolist() == [[0.0, 0.0, 9.0, 7.0]]


def test_equal_scores_are_all_kept_each_with_its_own_query_and_class():
    boxes = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(0))
    (result,) = postprocess(torch.zeros(1, 6, 5), boxes, [(10, 10)])
    assert result.scores.tolist() == [0.5] * 30
    pairs = {
        (label, tuple(box)) for label, box in zip(result.labels.tolist(), result.boxes_xyxy_px.tolist(), strict=True)
    }
    assert len(pairs) == 30


def test_of_more_ties_than_rows_the_authors_choose_as_we_do():
    """Which of the tied pairs come first is torch.topk's choice, on the same flattened scores as the authors'."""
    logits = torch.randint(0, 2, (2, 40, 7), generator=torch.Generator().manual_seed(0)).float()
    boxes = torch.rand(2, 40, 4, generator=torch.Generator().manual_seed(1))
    results = postprocess(logits, boxes, [(30, 20)] * 2)
    scores, best = torch.topk(logits.sigmoid().view(2, -1), 100, dim=1)
    for image, result in enumerate(results):
        assert torch.equal(result.scores, scores[image])
        assert torch.equal(result.labels, best[image] % 7)
        cx, cy, w, h = boxes[image][best[image] // 7].unbind(-1)
        expected = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), -1) * torch.tensor([20, 30, 20, 30])
        torch.testing.assert_close(result.boxes_xyxy_px, expected)


def test_outputs_that_are_no_coco_category_are_answers_like_any_other():
    logits = torch.full((1, 1, 91), -9.0)
    logits[0, 0, 0], logits[0, 0, 12], logits[0, 0, 83] = 1.0, 3.0, 2.0
    (result,) = postprocess(logits, torch.rand(1, 1, 4), [(10, 10)])
    assert result.labels[:3].tolist() == [12, 83, 0]
    logits[..., 0] = 9.0
    (result,) = postprocess_softmax(logits, torch.rand(1, 1, 4), [(10, 10)])
    assert result.labels.tolist() == [0]


def test_detr_answers_once_per_query_with_the_likeliest_class_that_is_an_object():
    logits = torch.tensor([[[1.0, 2.0, 9.0], [3.0, 0.0, 0.0], [0.0, 0.5, 0.0]]])  # the last is "no object"
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5], [0.0, 1.0, 1.0, 1.0]]])
    (result,) = postprocess_softmax(logits, boxes, [(100, 200)])
    assert result.labels.tolist() == [0, 1, 1]
    expected = [
        math.exp(3) / (math.exp(3) + 2),
        math.exp(0.5) / (math.exp(0.5) + 2),
        1 / (1 + math.exp(-1) + math.exp(7)),
    ]
    assert result.scores.tolist() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(
        result.boxes_xyxy_px, torch.tensor([[0.0, 50, 100, 100], [-100, 50, 100, 150], [80, 30, 120, 70]])
    )


def test_queries_of_detr_that_score_alike_stay_in_their_order():
    boxes = torch.rand(1, 100, 4, generator=torch.Generator().manual_seed(0))
    (result,) = postprocess_softmax(torch.zeros(1, 100, 4), boxes, [(10, 10)])
    (same,) = postprocess_softmax(torch.zeros(1, 100, 4), boxes.clone(), [(10, 10)])
    assert len(result.scores) == 100
    assert result.labels.tolist() == [0] * 100
    cx, _, w, _ = boxes[0].unbind(-1)
    torch.testing.assert_close(result.boxes_xyxy_px[:, 0], (cx - w / 2) * 10)
    assert torch.equal(result.boxes_xyxy_px, same.boxes_xyxy_px)


def test_each_family_is_decoded_its_own_way_to_float32():
    output = DetectorOutput(torch.zeros(1, 2, 4, dtype=torch.bfloat16), torch.rand(1, 2, 4).bfloat16())
    rows = {family: decode(family, output, [(10, 10)])[0] for family in (DEFORMABLE_DETR, DETR)}
    assert rows[DEFORMABLE_DETR].scores.tolist() == [0.5] * 8
    assert rows[DETR].scores.tolist() == [0.25] * 2
    boxes = torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    suppressed = SuppressedOutput(
        [torch.tensor([0.75]), torch.empty(0)], [torch.tensor([17]), torch.empty(0, dtype=torch.long)],
        [boxes, torch.empty(0, 4)],
    )  # fmt: skip
    found, nothing = decode(FASTER_RCNN, suppressed, [(40, 20), (30, 30)])
    assert (found.scores.tolist(), found.labels.tolist()) == ([0.75], [17])
    assert found.boxes_xyxy_px.tolist() == [[0.0, 10.0, 10.0, 40.0]]
    assert len(nothing.scores) == len(nothing.labels) == len(nothing.boxes_xyxy_px) == 0
    assert all(row.scores.dtype == row.boxes_xyxy_px.dtype == torch.float32 for row in rows.values())


def test_detections_copied_at_once_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, 91, generator=generator)
    rows = postprocess(logits, torch.rand(3, 20, 4, generator=generator), [(480, 640), (8192, 20000), (3, 5)])
    for copied, row in zip(copy_at_once(rows), rows, strict=True):
        for name in ("scores", "labels", "boxes_xyxy_px"):
            assert torch.equal(getattr(copied, name), getattr(row, name))
            assert getattr(copied, name).dtype == getattr(row, name).dtype
