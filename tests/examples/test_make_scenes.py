"""The generated scenes: what they promise about boxes, sizes and repeatability."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "make_scenes.py"


@pytest.fixture(scope="module")
def scenes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_scenes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_scenes"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def many(scenes: ModuleType) -> list[Any]:
    return [scenes.make_scene(123, index) for index in range(1, 61)]


def longer_sides(scene: Any) -> list[float]:
    return [max(loop.max(axis=0) - loop.min(axis=0)) for loop in (shape.loops[0] for shape in scene.shapes)]


def test_the_same_seed_and_index_give_the_same_scene(scenes: ModuleType) -> None:
    first, again, other = scenes.make_scene(5, 9), scenes.make_scene(5, 9), scenes.make_scene(5, 10)
    assert first.image.tobytes() == again.image.tobytes()
    assert [s.box_xyxy(*first.image.size) for s in first.shapes] == [
        s.box_xyxy(*again.image.size) for s in again.shapes
    ]
    assert first.image.tobytes() != other.image.tobytes()


def test_a_scene_of_scale_3_has_more_objects_on_more_room_and_small_ones_stay_small(scenes: ModuleType) -> None:
    scene = scenes.make_scene(5, 9, 3)
    assert 3 * 288 <= max(scene.image.size) <= 3 * 384
    assert 15 < len(scene.shapes) <= 9 * 14
    assert min(longer_sides(scene)) < 32


def test_boxes_fit_the_drawn_shapes_to_a_pixel(scenes: ModuleType, many: list[Any]) -> None:
    for scene in many[:20]:
        width, height = scene.image.size
        for shape in scene.shapes:
            drawn = scenes.coverage(shape.loops, (0, 0, width, height)) > 0.02
            rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
            extent = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            # A tip of a star covers less than 2 % of its last pixel, and edges lie anywhere within one.
            np.testing.assert_allclose(shape.box_xyxy(width, height), extent, atol=1.3)


def test_shapes_are_drawn_where_their_boxes_are(scenes: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for size in (9.0, 40.0, 120.0):
        for _ in range(20):
            shape = scenes.place_shape(0, size, (100 + rng.random(), 90 + rng.random()), rng)
            drawn = scenes.coverage(shape.loops, (0, 0, 200, 200))
            y, x = np.mgrid[0:200, 0:200] + 0.5
            x0, y0, x1, y1 = shape.box_xyxy(200, 200)
            # a circle's centre of mass is its box's centre; half a pixel off would be a wrong convention
            assert (x * drawn).sum() / drawn.sum() == pytest.approx((x0 + x1) / 2, abs=0.1)
            assert (y * drawn).sum() / drawn.sum() == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_objects_reach_from_8_pixels_to_half_the_picture(many: list[Any]) -> None:
    for scene in many:
        assert all(8 - 1e-6 <= side <= min(scene.image.size) / 2 + 1e-6 for side in longer_sides(scene))
    sides = np.concatenate([longer_sides(scene) for scene in many])
    assert sides.min() < 12
    assert sides.max() > 100


def test_about_a_tenth_of_the_objects_are_under_16_pixels(many: list[Any]) -> None:
    sides = np.concatenate([longer_sides(scene) for scene in many])
    # 500 draws with probability 0.1: six standard deviations are 0.08
    assert (sides < 16).mean() == pytest.approx(0.10, abs=0.08)


def test_every_class_is_about_as_frequent_as_the_others(scenes: ModuleType, many: list[Any]) -> None:
    counts = np.bincount([shape.label for scene in many for shape in scene.shapes], minlength=len(scenes.CLASSES))
    assert len(counts) == len(scenes.CLASSES)
    assert counts.min() > 0.5 * counts.mean()


def test_scenes_have_many_sizes_and_both_orientations(many: list[Any]) -> None:
    sizes = {scene.image.size for scene in many}
    assert len(sizes) > 30
    assert any(w > h for w, h in sizes)
    assert any(w < h for w, h in sizes)
    assert all(3 <= len(scene.shapes) <= 14 for scene in many[:10])


def test_no_object_hides_more_than_it_may(scenes: ModuleType, many: list[Any]) -> None:
    for scene in many[:20]:
        width, height = scene.image.size
        masks = [scenes.coverage(shape.loops, (0, 0, width, height)) > 0.5 for shape in scene.shapes]
        for index, mask in enumerate(masks):
            hidden = np.any(masks[index + 1 :] or [np.zeros_like(mask)], axis=0)
            # a few pixels more: edges are rasterised at another resolution here
            assert (mask & hidden).sum() <= scenes.MOST_HIDDEN * mask.sum() + 4


def test_objects_stand_out_from_what_they_are_painted_on(scenes: ModuleType) -> None:
    rng = np.random.default_rng(0)
    under = np.array([120.0, 130.0, 125.0], dtype=np.float32)
    distances = [np.linalg.norm(scenes.contrasting_colour(under, rng) - under) for _ in range(200)]
    assert np.quantile(distances, 0.05) > 55


def test_a_data_set_is_what_pycocotools_reads(scenes: ModuleType, tmp_path: Path) -> None:
    assert scenes.main([str(tmp_path), "--count", "4", "--seed", "3"]) == 0
    # Any, because pycocotools has no types
    coco: Any = importlib.import_module("pycocotools.coco").COCO(tmp_path / "annotations" / "val.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(scenes.CLASSES)
    assert coco.getImgIds() == [1, 2, 3, 4]
    assert coco.getAnnIds() == list(range(1, len(coco.anns) + 1))
    for image in coco.imgs.values():
        with Image.open(tmp_path / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]])):
            x, y, w, h = annotation["bbox"]
            assert 0 <= x < x + w <= image["width"] + 0.01
            assert 0 <= y < y + h <= image["height"] + 0.01
            assert annotation["area"] == pytest.approx(w * h, abs=0.01)
            assert annotation["iscrowd"] == 0


def test_two_splits_share_the_folder_of_pictures_but_no_picture(scenes: ModuleType, tmp_path: Path) -> None:
    scenes.main([str(tmp_path), "--count", "2", "--seed", "1", "--split", "train"])
    scenes.main([str(tmp_path), "--count", "2", "--seed", "2", "--split", "val"])
    names = [
        {
            image["file_name"]
            for image in json.loads((tmp_path / "annotations" / f"{split}.json").read_text())["images"]
        }
        for split in ("train", "val")
    ]
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == {path.name for path in (tmp_path / "images").iterdir()}


@pytest.mark.parametrize("bad", [["--count", "0"], ["--seed", "-1"], ["--count", "many"]])
def test_a_bad_number_exits_2(scenes: ModuleType, bad: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        scenes.main([str(tmp_path / "out"), *bad])
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()


def test_eight_example_pictures_are_there_and_small() -> None:
    pictures = sorted((SCRIPT.parent / "images").iterdir())
    assert len(pictures) == 8
    for path in pictures:
        assert path.stat().st_size < 64_000
        with Image.open(path) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) <= 384
