from __future__ import annotations

import pytest
import torch

from ddetr_cli.model.postprocess import postprocess


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
