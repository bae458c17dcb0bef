from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.evaluate.table import Detection, TableBuilder, merged, ranks, table_of

Truth = Callable[..., CocoAnnotations]
BOX = (10.0, 20.5, 30.0, 1 / 3)


def test_a_detection_is_written_as_a_results_row() -> None:
    row = {"image_id": "x", "category_id": 3, "bbox": list(BOX), "score": 0.25}
    assert Detection("x", 3, BOX, 0.25).to_json() == row


def test_a_table_gives_back_what_was_put_in(truth: Truth) -> None:
    detections = [Detection("b", 7, BOX, 0.1), Detection(3, 7, BOX, 1.0), Detection("b", 99, BOX, 0.5)]
    table = table_of(truth((3, 7, BOX), ("b", 8, BOX)), detections)
    assert list(table) == detections
    assert len(table) == 3
    assert table.category_ids == (7, 8, 99)  # those of the data set first


def test_a_table_takes_48_bytes_a_detection(truth: Truth) -> None:
    builder = TableBuilder(truth((1, 1, BOX)))
    builder.extend([Detection(1, 1, BOX, 0.5)] * 1000)
    table = builder.build()
    columns = (table.image, table.category, table.boxes_xywh, table.scores)
    assert sum(column.nbytes for column in columns) == 48 * 1000


def test_a_detection_in_an_image_of_another_data_set_is_no_row(truth: Truth) -> None:
    builder = TableBuilder(truth((1, 1, BOX)))
    with pytest.raises(KeyError):
        builder.add(2, 1, BOX, 0.5)


def test_a_table_can_be_cut_to_some_of_the_images_in_another_order(truth: Truth) -> None:
    ground_truth = truth((1, 1, BOX), (2, 1, BOX), (3, 1, BOX))
    table = table_of(ground_truth, [Detection(i, 1, BOX, 0.1 * i) for i in (1, 2, 3)])
    part = ground_truth.subset((ground_truth.images[2], ground_truth.images[0]))
    assert list(table.of(part)) == [Detection(1, 1, BOX, 0.1), Detection(3, 1, BOX, 0.1 * 3)]
    assert table.of(part).image_ids == (3, 1)


def test_the_lines_of_a_table_are_a_results_file(truth: Truth) -> None:
    ground_truth = truth((1, 1, BOX))
    detections = [Detection(1, 1, BOX, 0.1), Detection(1, 1, BOX, 1e-9)]
    text = b"".join(table_of(ground_truth, detections).to_json_lines())
    assert json.loads(text) == [detection.to_json() for detection in detections]
    assert text.count(b"\n") == 4  # a line each
    assert b"".join(table_of(ground_truth, []).to_json_lines()) == b"[]\n"


def test_what_is_not_a_number_is_never_written(truth: Truth) -> None:
    table = table_of(truth((1, 1, BOX)), [Detection(1, 1, BOX, 0.5)])
    with pytest.raises(ValueError, match="JSON"):
        list(replace(table, scores=np.array([np.nan])).to_json_lines())


def test_ids_are_ranked_numbers_first_and_by_value() -> None:
    assert ranks([10, "10", 9, -1, "9", 2**60]).tolist() == [2, 4, 1, 0, 5, 3]


def test_the_tables_of_shares_become_one_in_the_order_of_the_images(truth: Truth) -> None:
    ground_truth = truth((1, 7, BOX), (2, 7, BOX), (3, 7, BOX))
    images = ground_truth.images
    found = [Detection(i, c, BOX, s) for i, c, s in ((1, 7, 0.1), (1, 9, 0.2), (2, 8, 0.3), (3, 9, 0.4), (3, 7, 0.5))]
    shares = [
        table_of(ground_truth.subset(part), [d for d in found if d.image_id in {image.id for image in part}])
        for part in (images[::2], images[1::2])
    ]
    assert list(merged(ground_truth, shares)) == found


def test_detections_that_overlap_a_better_one_of_their_image_and_category_are_left_out(truth: Truth) -> None:
    near, far = (10.0, 20.5, 29.0, 1 / 3), (90.0, 20.5, 30.0, 1 / 3)
    rows = [
        Detection("b", 7, near, 0.3),  # worse than the next but one, of another image
        Detection(3, 7, near, 0.4),
        Detection(3, 7, BOX, 0.9),
        Detection(3, 8, BOX, 0.5),
        Detection(3, 7, far, 0.2),
        Detection("b", 7, BOX, 0.3),  # as good as the first, which comes before
    ]
    table = table_of(truth((3, 7, BOX), ("b", 8, BOX)), rows)
    assert list(table.without_overlaps(0.7)) == [rows[0], *rows[2:5]]
    assert list(table.without_overlaps(0.99)) == rows
    assert len(table.rows(table.scores > 1).without_overlaps(0.7)) == 0
