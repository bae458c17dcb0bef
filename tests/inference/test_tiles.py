from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.errors import DeviceError, UsageError
from ddetr_cli.inference.ahead import helper_threads
from ddetr_cli.inference.detections import ImageDetections
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.inference.preparation import Preparation, Prepared
from ddetr_cli.inference.tiles import Tiling, View

if TYPE_CHECKING:
    from ddetr_cli.weights import LoadedModel

Box = tuple[float, float, float, float]
Row = tuple[Box, float, int]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def found(*rows: Row, dropped: int = 0) -> ImageDetections:
    boxes, scores, labels = ([row[i] for row in rows] for i in range(3))
    return ImageDetections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
        dropped,
    )


def rows_of(detections: ImageDetections) -> list[Row]:
    return [
        (tuple(box), round(score, 5), label)
        for box, score, label in zip(
            detections.boxes_xyxy_px.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
        )
    ]


@pytest.mark.parametrize("size", [(1000, 700), (101, 100), (100, 5000), (333, 333), (40, 101)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_tiles_of_one_size_cover_the_picture_and_share_at_least_the_overlap(
    size: tuple[int, int], overlap: float
) -> None:
    tiling = Tiling(100, overlap)
    whole, *tiles = tiling.views(*size)
    assert whole == View(0, 0, *size)
    assert {(t.right - t.left, t.bottom - t.top) for t in tiles} == {(min(100, size[0]), min(100, size[1]))}
    for axis in (0, 1):
        spans = sorted({(tile[axis], tile[axis + 2]) for tile in tiles})
        assert spans[0][0] == 0
        assert spans[-1][1] == size[axis]
        assert all(end - start >= tiling.shared_px for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_picture_no_larger_than_a_tile_is_looked_at_once() -> None:
    assert Tiling(100).views(100, 100) == [View(0, 0, 100, 100)]
    assert Tiling(100).views(40, 60) == [View(0, 0, 40, 60)]


@pytest.mark.parametrize(("size", "overlap"), [(31, 0.2), (0, 0.2), (100, -0.1), (100, 0.95), (100, float("nan"))])
def test_impossible_tiles_are_refused(size: int, overlap: float) -> None:
    with pytest.raises(UsageError, match="tile"):
        Tiling(size, overlap)


# Two tiles, [0,100) and [60,160), that share 40 px, and the whole.
TILING = Tiling(100, 0.4)
VIEWS = [View(0, 0, 160, 100), View(0, 0, 100, 100), View(60, 0, 160, 100)]


def merged(whole: ImageDetections, left: ImageDetections, right: ImageDetections) -> list[Row]:
    assert TILING.views(160, 100) == VIEWS
    return rows_of(TILING.merge(VIEWS, [whole, left, right]))


NONE = found()


def test_what_lies_in_one_tile_is_moved_to_its_place() -> None:
    assert merged(NONE, found(((5, 5, 25, 25), 0.5, 0)), found(((50, 5, 70, 25), 0.75, 1))) == [
        ((110, 5, 130, 25), 0.75, 1),
        ((5, 5, 25, 25), 0.5, 0),
    ]


def test_of_an_object_that_a_border_cuts_the_whole_one_of_the_neighbour_stays_whatever_the_scores() -> None:
    cut, uncut = found(((80, 10, 100, 30), 0.9, 0)), found(((20, 10, 50, 30), 0.25, 0))
    assert merged(NONE, cut, uncut) == [((80, 10, 110, 30), 0.25, 0)]


def test_of_an_object_that_two_tiles_see_whole_the_better_one_stays() -> None:
    assert merged(NONE, found(((65, 10, 90, 30), 0.5, 0)), found(((5, 10, 31, 30), 0.75, 0))) == [
        ((65, 10, 91, 30), 0.75, 0)
    ]


def test_overlapping_boxes_of_one_tile_or_of_two_classes_all_stay() -> None:
    one_tile = found(((65, 10, 90, 30), 0.5, 0), ((65, 10, 91, 30), 0.4, 0))
    assert len(merged(NONE, one_tile, NONE)) == 2
    assert len(merged(NONE, found(((65, 10, 90, 30), 0.5, 0)), found(((5, 10, 31, 30), 0.75, 1)))) == 2


def test_the_view_of_the_whole_tells_of_objects_too_large_for_the_overlap_and_of_no_others() -> None:
    whole = found(((10, 10, 150, 90), 0.5, 0), ((70, 10, 90, 30), 0.9, 0))
    halves = found(((10, 10, 100, 90), 0.8, 0)), found(((0, 10, 90, 90), 0.8, 0))
    assert merged(whole, *halves) == [((10, 10, 150, 90), 0.5, 0)]


def test_a_box_at_the_border_of_the_picture_is_not_cut() -> None:
    assert len(merged(NONE, found(((-2, -1, 20, 100), 0.5, 0)), found(((80, 60, 101, 101), 0.5, 0)))) == 2


def test_dropped_rows_of_all_views_add_up() -> None:
    merged = TILING.merge(VIEWS, [found(dropped=1), found(dropped=2), found(dropped=4)])
    assert merged.dropped == 7
    assert merged.boxes_xyxy_px.shape == (0, 4)


@pytest.mark.parametrize("seed", range(5))
def test_with_a_perfect_detector_every_object_is_found_once(seed: int) -> None:
    """Objects of every size up to half the picture; the detector reports what it sees of each in every view."""
    source = random.Random(seed)
    tiling = Tiling(100, 0.3)
    objects: list[Row] = []
    for number in range(60):
        w, h = (source.uniform(3, 25) if number else 250.0 for _ in range(2))
        x, y = source.uniform(0, 500 - w), source.uniform(0, 400 - h)
        # Classes of their own: two objects on one spot are a question to the detector, not to the merging.
        objects.append(((x, y, x + w, y + h), source.random(), number))
    views = tiling.views(500, 400)
    seen = []
    for view in views:
        rows = []
        for (x0, y0, x1, y1), score, label in objects:
            part = (max(x0, view.left), max(y0, view.top), min(x1, view.right), min(y1, view.bottom))
            if part[0] < part[2] and part[1] < part[3]:
                shifted = tuple(value - (view.left, view.top)[i % 2] for i, value in enumerate(part))
                rows.append((shifted, score, label))
        seen.append(found(*rows))  # type: ignore[arg-type]
    result = rows_of(tiling.merge(views, seen))
    assert sorted(label for _, _, label in result) == list(range(60))
    for box, _, label in result:
        assert box == pytest.approx(objects[label][0], abs=1e-3)


def test_a_small_picture_gives_what_it_gives_without_tiles(loaded: LoadedModel) -> None:
    picture = noise(64, 48)
    plain = Predictor(loaded, device="cpu").predict([picture])[0]
    tiled = Predictor(loaded, device="cpu", tiles=Tiling(64)).predict([picture])[0]
    assert rows_of(tiled) == rows_of(plain)


def test_a_large_picture_gives_what_its_parts_give_merged(loaded: LoadedModel) -> None:
    picture, tiling = noise(150, 90), Tiling(64, 0.25)
    plain, tiled = Predictor(loaded, device="cpu"), Predictor(loaded, device="cpu", tiles=tiling)
    views = tiling.views(150, 90)
    expected = tiling.merge(views, plain.predict([picture.crop(view) for view in views]))
    small = noise(64, 48, seed=1)
    both = tiled.predict([picture, small])
    assert rows_of(both[0]) == rows_of(expected)
    assert rows_of(both[1]) == rows_of(plain.predict([small])[0])
    assert len(both[0].scores) > 100


def test_only_a_few_tiles_are_prepared_at_a_time(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, most = [0], [0]
    call, run = Preparation.__call__, Predictor._try_batch

    def prepare(self: Preparation, image: Image.Image, size_hw: tuple[int, int] | None = None) -> Prepared:
        waiting[0] += self.tiles is None
        most[0] = max(most[0], waiting[0])
        return call(self, image, size_hw)

    def predict(self: Predictor, images: list[Prepared]) -> list[ImageDetections] | None:
        waiting[0] -= len(images)
        return run(self, images)

    monkeypatch.setattr(Preparation, "__call__", prepare)
    monkeypatch.setattr(Predictor, "_try_batch", predict)
    tiling = Tiling(32, 0.0)
    Predictor(loaded, device="cpu", tiles=tiling).predict([noise(320, 320)])
    assert len(tiling.views(320, 320)) == 101
    assert waiting == [0]
    assert most[0] <= helper_threads("cpu") + 2


def test_a_tile_that_does_not_fit_into_memory_fails_its_picture_alone(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = Predictor._run_batch, [0]

    def fail(self: Predictor, images: list[Prepared]) -> list[ImageDetections]:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError
        return run(self, images)

    monkeypatch.setattr(Predictor, "_run_batch", fail)
    predictor = Predictor(loaded, device="cpu", tiles=Tiling(64))
    outcomes = predictor.predict_each([noise(150, 90), noise(150, 90)])
    assert isinstance(outcomes[0], DeviceError)
    assert isinstance(outcomes[1], ImageDetections)


def test_a_picture_of_very_many_boxes_is_merged_in_no_time() -> None:
    import time

    tiling = Tiling(100, 0.25)
    views = tiling.views(2000, 2000)
    source = np.random.default_rng(0)
    seen = []
    for _ in views:
        corners = source.uniform(0, 90, (40, 2))
        boxes = torch.from_numpy(np.concatenate((corners, corners + source.uniform(3, 30, (40, 2))), axis=1)).float()
        seen.append(ImageDetections(boxes, torch.from_numpy(source.random(40)).float(), torch.zeros(40).long()))
    start = time.process_time()
    assert len(tiling.merge(views, seen).scores) > 10_000
    assert time.process_time() - start < 20  # comparing all with all takes hours
