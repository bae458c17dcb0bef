from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.data.annotations import read_annotations
from ddetr_cli.data.locate import Purpose
from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.errors import DatasetError

NAN = float("nan")
INFINITY = float("inf")
Document = dict[str, Any]


def document() -> Document:
    """Ten images of 640x480, one box of 60x80 in each, categories 1 and 2 in turn."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, 11)],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": 1 + i % 2,
                "bbox": [30 * i, 20, 60, 80],
                "area": 4800,
                "iscrowd": 0,
            }
            for i in range(1, 11)
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., CocoAnnotations]:
    def _read(content: Any, **options: Any) -> CocoAnnotations:
        file = tmp_path / "instances.json"
        file.write_text(json.dumps(content))
        return read_annotations(file, **options)

    return _read


Read = Callable[..., CocoAnnotations]


@pytest.mark.parametrize("purpose", ["train", "eval"])
def test_a_clean_file_is_taken_as_it_is(read: Read, purpose: Purpose) -> None:
    found = read(document(), purpose=purpose)
    assert found.repairs == ()
    assert [image.file_name for image in found.images] == [f"{i}.jpg" for i in range(1, 11)]
    assert [(c.id, c.name) for c in found.categories] == [(1, "a"), (2, "b")]
    first = found.annotations[0]
    assert (first.id, first.image_id, first.category_id, first.iscrowd) == (1, 1, 2, False)
    assert (first.bbox_xywh, first.area) == ((30.0, 20.0, 60.0, 80.0), 4800.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a, i: a.update(id=i), "ids 0, renumbered from 1"),
        (lambda a, i: a.update(id=7), "ids repeated, renumbered from 1"),
        (lambda a, i: a.pop("id"), "ids missing, renumbered from 1"),
    ],
)
def test_useless_annotation_ids_are_renumbered_from_1_with_one_sentence(
    read: Read, change: Callable[[Document, int], Any], expected: str
) -> None:
    content = document()
    for index, annotation in enumerate(content["annotations"]):
        change(annotation, index)
    found = read(content)
    assert [annotation.id for annotation in found.annotations] == list(range(1, 11))
    assert len(found.repairs) == 1
    assert expected in found.repairs[0]
    assert "10 of 10" in found.repairs[0]


def test_missing_area_and_iscrowd_are_filled_and_counted(read: Read) -> None:
    content = document()
    for annotation in content["annotations"][:3]:
        del annotation["area"], annotation["iscrowd"]
    found = read(content)
    assert all(annotation.area == 4800 and not annotation.iscrowd for annotation in found.annotations)
    assert len(found.repairs) == 2
    assert all("3 of 10" in sentence for sentence in found.repairs)


def test_area_0_everywhere_is_replaced(read: Read) -> None:
    content = document()
    for annotation in content["annotations"]:
        annotation["area"] = 0
    found = read(content)
    assert {annotation.area for annotation in found.annotations} == {4800.0}
    assert "area 0 everywhere" in found.repairs[0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0", False), ("1", True), (True, True), (False, False), (1, True), (1.0, True), (None, False)],
)
def test_iscrowd_is_coerced(read: Read, value: object, expected: bool) -> None:
    content = document()
    content["annotations"][0]["iscrowd"] = value
    assert read(content).annotations[0].iscrowd is expected


@pytest.mark.parametrize("value", ["yes", 2, -1, [], NAN])
def test_any_other_iscrowd_is_refused(read: Read, value: object) -> None:
    content = document()
    content["annotations"][0]["iscrowd"] = value
    with pytest.raises(DatasetError, match=r"iscrowd is neither 0 nor 1 \(annotation id 1: "):
        read(content)


@pytest.mark.parametrize("value", ["big", -1, NAN, INFINITY, True])
def test_an_area_that_is_no_area_is_refused(read: Read, value: object) -> None:
    content = document()
    content["annotations"][0]["area"] = value
    with pytest.raises(DatasetError, match=r"area is not a number >= 0 \(annotation id 1: "):
        read(content)


BAD_BOXES = [
    [1, 2, 3],
    [1, 2, 3, 4, 5],
    [],
    None,
    ["1", "2", "3", "4"],
    "1234",
    [NAN, 1, 2, 3],
    [0, 0, INFINITY, 5],
    [0, 0, 10**400, 5],
]


@pytest.mark.parametrize("purpose", ["train", "eval"])
@pytest.mark.parametrize("box", BAD_BOXES, ids=str)
def test_a_bbox_that_is_not_four_finite_numbers_is_refused_by_annotation_id(
    read: Read, box: object, purpose: Purpose
) -> None:
    content = document()
    content["annotations"][4].update(id=77, bbox=box)
    with pytest.raises(
        DatasetError, match=r"1 of 10 annotations: bbox is not four finite numbers \(annotation id 77: "
    ):
        read(content, purpose=purpose)


def test_bad_annotations_are_dropped_and_counted_on_request(read: Read) -> None:
    content = document()
    content["annotations"][4]["bbox"] = None
    found = read(content, skip_bad=True, max_bad=0.1)
    assert len(found.annotations) == 9
    assert "1 of 10 annotations dropped: bbox is not four finite numbers (annotation id 5: None)" in found.repairs[0]


def test_more_than_the_tolerated_share_of_bad_annotations_is_refused_even_so(read: Read) -> None:
    content = document()
    content["annotations"][4]["bbox"] = None
    with pytest.raises(DatasetError, match=r"1 of 10 annotations: unusable, more than the 0\.05 .*raise --max-bad"):
        read(content, skip_bad=True)


@pytest.mark.parametrize(("key", "value"), [("image_id", 999), ("category_id", 99)])
def test_an_annotation_of_nothing_listed_is_refused_for_training_and_dropped_for_scoring(
    read: Read, key: str, value: int
) -> None:
    content = document()
    content["annotations"][0][key] = value
    with pytest.raises(DatasetError, match=rf"that is not listed \(annotation id 1: {value}\)"):
        read(content, purpose="train")
    found = read(content, purpose="eval")
    assert len(found.annotations) == 9
    assert "1 of 10 annotations dropped" in found.repairs[0]


@pytest.mark.parametrize("box", [[5, 5, 0, 0], [50, 50, -20, -20], [5, 5, 10, 0]], ids=str)
@pytest.mark.parametrize("purpose", ["train", "eval"])
def test_a_box_without_size_is_dropped_and_counted(read: Read, box: list[float], purpose: Purpose) -> None:
    content = document()
    content["annotations"][0]["bbox"] = box
    found = read(content, purpose=purpose)
    assert [annotation.id for annotation in found.annotations] == list(range(2, 11))
    assert "1 of 10 annotations dropped: bbox without width or height" in found.repairs[0]


def test_a_box_under_one_pixel_is_dropped_for_training_and_scored_otherwise(read: Read) -> None:
    content = document()
    content["annotations"][0]["bbox"] = [5, 5, 0.5, 30]
    assert len(read(content, purpose="train").annotations) == 9
    assert read(content, purpose="eval").annotations[0].bbox_xywh == (5.0, 5.0, 0.5, 30.0)


def test_a_box_across_the_border_is_clipped_for_training_and_scored_as_it_stands(read: Read) -> None:
    content = document()
    content["annotations"][0]["bbox"] = [-10, 400, 60, 100]
    trained = read(content, purpose="train")
    assert trained.annotations[0].bbox_xywh == (0.0, 400.0, 50.0, 80.0)
    assert "1 of 10 annotations: bbox partly outside its image, clipped" in trained.repairs[0]
    scored = read(content, purpose="eval")
    assert scored.annotations[0].bbox_xywh == (-10.0, 400.0, 60.0, 100.0)
    assert scored.repairs == ()


def test_a_box_outside_its_image_is_dropped_for_training_only(read: Read) -> None:
    content = document()
    content["annotations"][0]["bbox"] = [9000, 9000, 50, 50]
    assert len(read(content, purpose="train").annotations) == 9
    assert len(read(content, purpose="eval").annotations) == 10


def test_corners_are_recognised_by_the_areas_beside_them(read: Read) -> None:
    content = document()
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    with pytest.raises(DatasetError, match="looks like xyxy"):
        read(content)


def test_corners_are_recognised_by_boxes_that_would_leave_their_image(read: Read) -> None:
    content = document()
    for annotation in content["annotations"]:
        annotation["bbox"] = [400, 300, 460, 380]
        del annotation["area"]
    with pytest.raises(DatasetError, match=r"looks like xyxy .*10 of 10"):
        read(content)


def test_big_boxes_in_the_upper_left_are_not_taken_for_corners(read: Read) -> None:
    content = document()
    for annotation in content["annotations"]:
        annotation.update(bbox=[0, 0, 640, 480], area=640 * 480)
    assert len(read(content).annotations) == 10


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_missing_or_null_list_is_refused_by_name(read: Read, key: str) -> None:
    content = document()
    content[key] = None
    with pytest.raises(DatasetError, match=f"'{key}' is null, not a list"):
        read(content)
    del content[key]
    with pytest.raises(DatasetError, match=f"no key '{key}'"):
        read(content)


def test_a_list_at_the_top_is_refused(read: Read) -> None:
    with pytest.raises(DatasetError, match="top level is a list"):
        read(document()["annotations"])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda d: d["images"][0].pop("id"), r"no 'id' \(images\[0\]\)"),
        (lambda d: d["images"][0].pop("file_name"), r"no 'file_name' \(images\[0\]\)"),
        (lambda d: d["images"][0].pop("width"), r"no 'width' \(images\[0\]\)"),
        (lambda d: d["images"][0].update(height=0), r"not a size in pixels \(image 1: 640x0\)"),
        (lambda d: d["images"][0].update(id=None), r"id is neither integer nor string \(images\[0\]: None\)"),
        (lambda d: d["images"].append("x"), r"a string, not an object \(images\[10\]\)"),
        (lambda d: d["categories"][1].pop("name"), r"no 'name' \(categories\[1\]\)"),
        (lambda d: d["images"].clear(), "'images' is empty"),
        (lambda d: d["categories"].clear(), "'categories' is empty"),
        (lambda d: d["images"][1].update(id=1), r"1 of 10 images: image id occurs repeatedly \(1\)"),
        (
            lambda d: d["images"][1].update(file_name="1.jpg"),
            r"1 of 10 images: file_name occurs repeatedly \('1.jpg'\)",
        ),
        (
            lambda d: d["categories"].append({"id": 1, "name": "c"}),
            r"1 of 3 categories: category id occurs repeatedly \(1\)",
        ),
        (lambda d: d["annotations"].clear(), "no usable annotation among 0"),
        (lambda d: d["annotations"][0].pop("bbox"), r"no 'bbox' \(annotation id 1\)"),
        (lambda d: d["annotations"][0].pop("image_id"), r"no 'image_id' \(annotation id 1\)"),
        (lambda d: d["annotations"].append(3), r"a number, not an object \(entry 10\)"),
    ],
)
def test_what_cannot_be_repaired_is_refused_with_its_place(
    read: Read, spoil: Callable[[Document], Any], expected: str
) -> None:
    content = document()
    spoil(content)
    with pytest.raises(DatasetError, match=expected):
        read(content)


@pytest.mark.parametrize("make", [str, lambda i: i + 2**60, lambda i: str(i) if i % 2 else i])
def test_ids_of_any_kind_are_kept_unchanged(read: Read, make: Callable[[int], int | str]) -> None:
    content = document()
    for image in content["images"]:
        image["id"] = make(image["id"])
    for category in content["categories"]:
        category["id"] = make(category["id"])
    for annotation in content["annotations"]:
        annotation["image_id"] = make(annotation["image_id"])
        annotation["category_id"] = make(annotation["category_id"])
    found = read(content, purpose="train")
    assert [image.id for image in found.images] == [make(i) for i in range(1, 11)]
    assert [annotation.image_id for annotation in found.annotations] == [make(i) for i in range(1, 11)]
    assert [category.id for category in found.categories] == [make(1), make(2)]


def test_category_ids_with_gaps_from_0_and_above_90_are_kept(read: Read) -> None:
    content = document()
    content["categories"] = [{"id": 0, "name": "a"}, {"id": 500, "name": "b"}]
    for index, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = 500 * (index % 2)
    found = read(content)
    assert {annotation.category_id for annotation in found.annotations} == {0, 500}
    assert found.class_table().category_ids == (0, 500)


def test_category_names_may_be_anything_and_repeat(read: Read) -> None:
    content = document()
    content["categories"] = [{"id": 1, "name": "a,\n\x1b[31m😀" + "x" * 10_000}, {"id": 2, "name": 7}]
    found = read(content)
    assert found.categories[0].name == content["categories"][0]["name"]
    assert found.categories[1].name == "7"
    content["categories"] = [{"id": 1, "name": "same"}, {"id": 2, "name": "same"}]
    assert [category.name for category in read(content).categories] == ["same", "same"]


def test_real_files_need_no_repair(data_dir: Path) -> None:
    files = sorted(data_dir.glob("*/annotations/*.json"))
    assert len(files) >= 10
    for file in files:
        for purpose in ("train", "eval"):
            found = read_annotations(file, purpose=purpose)
            assert len(found.annotations) == len(json.loads(file.read_text())["annotations"]), file
            assert found.repairs == (), file
