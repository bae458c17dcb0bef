from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.classes import ClassTable
from ddetr_cli.data.images import read_image
from ddetr_cli.detect.run import DECODERS, ImageResult, RunSummary, class_counts, detect_images
from ddetr_cli.detect.sources import Input, find_inputs
from ddetr_cli.errors import DeviceError, OutputError
from ddetr_cli.inference.predictor import ImageDetections, Predictor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ddetr_cli.weights import LoadedModel


class Keeper:
    """A sink that remembers everything."""

    def __init__(self, on_add: Callable[[ImageResult], None] = lambda result: None) -> None:
        self.results: list[ImageResult] = []
        self.pictures: list[Image.Image | None] = []
        self.ending = ""
        self.on_add = on_add

    def add(self, result: ImageResult, picture: Image.Image | None) -> None:
        self.on_add(result)
        self.results.append(result)
        self.pictures.append(picture)

    def finish(self) -> None:
        self.ending += "finished"

    def abandon(self) -> None:
        self.ending += "abandoned"


def write_photos(folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
    folder.mkdir(exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        values = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")


def run(
    inputs: Sequence[Input],
    loaded: LoadedModel,
    keeper: Keeper,
    *,
    threshold: float = 0.0,
    should_stop: Callable[[], bool] = lambda: False,
    device_type: str = "cpu",
) -> RunSummary:
    predictor = Predictor(loaded, device="cpu")
    if device_type == "cuda":  # windows and batches as on a GPU, arithmetic here
        predictor.batch_size = 4
        predictor.device = torch.device("meta")
        predictor.predict_each = Predictor(loaded, device="cpu").predict_each  # type: ignore[method-assign]
    return detect_images(inputs, predictor, [keeper], threshold=threshold, max_pixels=10_000, should_stop=should_stop)


def boxes(result: ImageResult) -> object:
    return result.boxes_xyxy_px, result.scores, result.labels


def test_results_come_in_input_order_with_ids_sizes_and_pictures(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(64, 48), (48, 64), (64, 48)])
    keeper = Keeper()
    summary = run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert [(r.input.name, r.image_id, r.size_wh) for r in keeper.results] == [
        ("0.png", 1, (64, 48)),
        ("1.png", 2, (48, 64)),
        ("2.png", 3, (64, 48)),
    ]
    assert all(picture is not None and picture.mode == "RGB" for picture in keeper.pictures)
    assert keeper.ending == "finished"
    assert (summary.processed, summary.failed, summary.detections) == (3, 0, 300)


def test_a_bad_image_between_good_ones_changes_nothing_for_them(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(64, 48)] * 8)
    inputs = find_inputs([str(tmp_path)]).images
    alone = []
    for item in inputs:
        keeper = Keeper()
        run([item], loaded, keeper)
        alone.append(keeper.results[0])
    (tmp_path / "3.png").write_bytes(b"not a picture")
    for device_type in ("cpu", "cuda"):
        keeper = Keeper()
        summary = run(inputs, loaded, keeper, device_type=device_type)
        assert (summary.processed, summary.failed) == (7, 1)
        for expected, result in zip(alone, keeper.results, strict=True):
            if result.input.name == "3.png":
                assert result.failure is not None
                assert "not an image" in result.failure
                assert result.image_id == 4
            else:
                assert boxes(result) == boxes(expected)


def test_a_file_that_goes_away_while_running_fails_alone(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(64, 48)] * 3)
    inputs = find_inputs([str(tmp_path)]).images
    (tmp_path / "1.png").unlink()
    keeper = Keeper()
    run(inputs, loaded, keeper)
    assert [r.failure for r in keeper.results] == [None, "no such file. Check the path.", None]


def test_pictures_above_the_pixel_limit_fail(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(101, 100), (100, 100)])
    keeper = Keeper()
    run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert keeper.results[0].failure is not None
    assert "exceeds the limit" in keeper.results[0].failure
    assert keeper.results[1].failure is None


def test_detections_at_the_threshold_are_kept_and_those_below_are_not(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(64, 48)])
    inputs = find_inputs([str(tmp_path)]).images
    every = Keeper()
    run(inputs, loaded, every)
    scores = every.results[0].scores
    assert len(scores) == 100
    assert scores == sorted(scores, reverse=True)
    some = Keeper()
    run(inputs, loaded, some, threshold=scores[10])
    assert some.results[0].scores == [score for score in scores if score >= scores[10]]


def test_a_request_to_stop_ends_after_the_images_in_work_and_names_the_rest(
    tmp_path: Path, loaded: LoadedModel
) -> None:
    write_photos(tmp_path, [(64, 48)] * 5)
    keeper = Keeper()
    summary = run(find_inputs([str(tmp_path)]).images, loaded, keeper, should_stop=lambda: len(keeper.results) >= 2)
    assert (summary.processed, summary.failed, summary.unfinished) == (2, 0, 3)
    assert [r.failure for r in keeper.results[2:]] == ["not processed (the run was stopped)."] * 3
    assert [r.image_id for r in keeper.results] == [1, 2, 3, 4, 5]
    assert keeper.ending == "finished"


def test_a_lost_device_keeps_what_was_done_and_names_the_rest(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, [(64, 48)] * 4)
    predict_each = Predictor.predict_each
    calls = []

    def lose(self: Predictor, images: Sequence[Image.Image]) -> list[ImageDetections | DeviceError]:
        calls.append(images)
        if len(calls) == 3:
            raise DeviceError("device cuda:0: failed (illegal memory access).")
        return predict_each(self, images)

    monkeypatch.setattr(Predictor, "predict_each", lose)
    keeper = Keeper()
    with pytest.raises(DeviceError, match="illegal"):
        run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert [r.failure is None for r in keeper.results] == [True, True, False, False]
    assert keeper.ending == "finished"


def test_a_defect_that_one_picture_brings_out_fails_that_picture_only(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, [(64, 48), (48, 64), (64, 48)])
    predict_each = Predictor.predict_each

    def fail(self: Predictor, images: Sequence[Image.Image]) -> list[ImageDetections | DeviceError]:
        if any(image.height > image.width for image in images):
            raise RuntimeError("shape mismatch")
        return predict_each(self, images)

    monkeypatch.setattr(Predictor, "predict_each", fail)
    for device_type in ("cpu", "cuda"):
        keeper = Keeper()
        summary = run(find_inputs([str(tmp_path)]).images, loaded, keeper, device_type=device_type)
        assert (summary.processed, summary.failed) == (2, 1)
        assert "internal error: RuntimeError: shape mismatch" in (keeper.results[1].failure or "")


def test_an_output_that_fails_ends_the_run_and_abandons_every_sink(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(64, 48)] * 3)

    def refuse(result: ImageResult) -> None:
        if result.image_id == 2:
            raise OutputError("out: not written (No space left on device).")

    keeper = Keeper(refuse)
    with pytest.raises(OutputError):
        run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert keeper.ending == "abandoned"
    assert [r.image_id for r in keeper.results] == [1]


def test_few_pictures_are_held_in_memory_at_once(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, [(64, 48)] * 20)
    opened: list[Path] = []

    def count(path: Path, *, max_pixels: int) -> Image.Image:
        opened.append(path)
        return read_image(path, max_pixels=max_pixels)

    monkeypatch.setattr("ddetr_cli.detect.run.read_image", count)
    ahead: list[int] = []
    keeper = Keeper(lambda result: ahead.append(len(opened) - result.image_id))
    run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert max(ahead) <= DECODERS
    assert len(opened) == 20


def test_classes_are_counted_the_most_frequent_first() -> None:
    summary = RunSummary(classes={0: 2, 2: 5, 1: 2})
    table = ClassTable((1, 2, 7), ("dog", "cat", None))
    assert class_counts(summary, table) == [("class 7", 5), ("cat", 2), ("dog", 2)]
