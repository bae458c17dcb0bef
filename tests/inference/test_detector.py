from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.errors import CheckpointError, DeviceError, ImageError, UsageError
from ddetr_cli.inference.detections import ImageDetections
from ddetr_cli.inference.detector import Detector
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.inference.suppression import rows_without_overlaps
from ddetr_cli.weights import save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ddetr_cli.inference.preparation import Prepared
    from ddetr_cli.weights import LoadedModel


@pytest.fixture(scope="module")
def model(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_checkpoint(path, loaded.model, loaded.classes)
    return path


@pytest.fixture
def detector(model: Path) -> Detector:
    return Detector(model, device="cpu", threshold=0.0)


def picture(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_a_large_jpeg_is_seen_as_the_command_sees_it_reduced_or_not(model: Path, tmp_path: Path) -> None:
    picture(size=(640, 480)).save(tmp_path / "a.jpg")
    reduced = Detector(model, device="cpu", precision="fp32", threshold=0.0, draft=True).detect(tmp_path / "a.jpg")
    whole = Detector(model, device="cpu", precision="fp32", threshold=0.0).detect(tmp_path / "a.jpg")
    assert (reduced.width, reduced.height) == (whole.width, whole.height) == (640, 480)
    array = np.asarray(Image.open(tmp_path / "a.jpg"))
    assert whole == Detector(model, device="cpu", precision="fp32", threshold=0.0).detect(array)
    assert whole != reduced


def test_a_file_a_picture_and_an_array_give_the_same(detector: Detector, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    expected = detector.detect(picture())
    assert len(expected) == 100
    assert (expected.width, expected.height) == (64, 48)
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png"), np.asarray(picture())):
        assert detector.detect(form) == expected


def test_detections_are_those_of_the_predictor_named_and_without_torch(
    detector: Detector, loaded: LoadedModel
) -> None:
    (found,) = Predictor(loaded, device="cpu").predict([picture()])
    results = detector.detect(picture())
    assert [tuple(one.box) for one in results] == [tuple(box) for box in found.boxes_xyxy_px.tolist()]
    assert [one.score for one in results] == found.scores.tolist()
    assert [one.class_index for one in results] == found.labels.tolist()
    assert {(one.class_index, one.category_id, one.label) for one in results} <= {
        (0, 1, "cat"),
        (1, 2, "dog"),
        (2, 7, "class 7"),
    }
    first = results[0]
    assert {type(value) for value in (first.score, *first.box)} == {float}
    assert {type(first.category_id), type(first.class_index)} == {int}


def test_detections_below_the_threshold_are_left_out(model: Path, detector: Detector) -> None:
    every = detector.detect(picture())
    at = every[9].score
    some = Detector(model, device="cpu", threshold=at).detect(picture())
    assert list(some) == [one for one in every if one.score >= at]


def test_boxes_that_overlap_a_better_one_of_their_class_are_left_out_when_asked(
    model: Path, detector: Detector
) -> None:
    every = detector.detect(picture())
    some = Detector(model, device="cpu", threshold=0.0, nms=0.05).detect(picture())
    rows = rows_without_overlaps([one.box for one in every], [one.class_index for one in every], 0.05)
    assert list(some) == [every[row] for row in rows]
    assert 0 < len(some) < len(every)
    with pytest.raises(UsageError, match="not between 0 and 1"):
        Detector(model, nms=1.0)


def test_many_pictures_come_in_order_and_each_as_if_alone(detector: Detector, tmp_path: Path) -> None:
    forms = [picture(0), picture(1, (48, 64)), np.asarray(picture(2)), picture(3)]
    assert list(detector.detect_many(forms)) == [detector.detect(form) for form in forms]
    assert list(detector.detect_many([])) == []


def test_pictures_of_an_endless_source_are_taken_as_they_are_needed(detector: Detector) -> None:
    taken = 0

    def camera() -> Iterator[Image.Image]:
        nonlocal taken
        while True:
            taken += 1
            yield picture(taken)

    results = detector.detect_many(camera())
    next(results)
    next(results)
    assert taken <= 4
    results.close()  # type: ignore[attr-defined]


def test_a_picture_that_cannot_be_read_ends_many_in_its_place(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    results = detector.detect_many([picture(), tmp_path / "bad.jpg", picture()])
    assert len(next(results)) == 100
    with pytest.raises(ImageError, match=r"bad\.jpg: not an image"):
        next(results)


@pytest.mark.parametrize("one", ["street.jpg", b"street.jpg", Path("street.jpg")])
def test_many_of_a_single_picture_is_refused_at_once(detector: Detector, one: object) -> None:
    with pytest.raises(UsageError, match=r"^detect_many\('street.jpg'\): one picture. Give a list, or call detect.$"):
        detector.detect_many(one)  # type: ignore[arg-type]


def test_several_threads_may_share_a_detector(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = threading.Semaphore(1)
    predict_prepared = Predictor.predict_prepared

    def alone(self: Predictor, images: Sequence[Prepared]) -> list[ImageDetections | DeviceError]:
        assert inside.acquire(blocking=False)
        try:
            return predict_prepared(self, images)
        finally:
            inside.release()

    expected = [detector.detect(picture(seed)) for seed in range(6)]
    monkeypatch.setattr(Predictor, "predict_prepared", alone)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda seed: detector.detect(picture(seed)), range(6))) == expected


def test_a_picture_too_large_for_the_device_raises(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Predictor, "predict_prepared", lambda self, images: [DeviceError("device cpu: out of memory")]
    )
    with pytest.raises(DeviceError, match="out of memory"):
        detector.detect(picture())


def test_it_tells_what_it_computes_with(detector: Detector) -> None:
    assert (detector.device, detector.image_size, detector.threshold) == ("cpu", 64, 0.0)
    assert detector.categories == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 7, "name": "class 7"}]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "no-such-model"}, CheckpointError, "no-such-model: no such model"),
        ({"model": ""}, UsageError, "empty"),
        ({"device": "gpu"}, UsageError, "device 'gpu': unknown"),
        ({"precision": "int3"}, UsageError, "precision 'int3': unknown"),
        ({"preprocess": "theirs"}, UsageError, "preprocess 'theirs': unknown"),
        ({"image_size": 0}, UsageError, "image size 0: "),
        ({"threshold": float("nan")}, UsageError, "threshold nan: not a score"),
        ({"preset": "r51"}, UsageError, "r51"),
    ],
)
def test_what_it_cannot_be_made_of_is_refused(
    model: Path, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Detector(**{"model": model, "device": "cpu", **arguments})  # type: ignore[arg-type]


def test_a_detector_says_nothing_itself(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Detector(model, device="cpu").detect(picture())
    assert capfd.readouterr() == ("", "")


def test_a_device_that_is_not_there_is_refused(model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(DeviceError, match="cuda:0: not available"):
        Detector(model, device="cuda:0")


def test_tiles_are_those_of_the_predictor(model: Path, loaded: LoadedModel) -> None:
    from ddetr_cli.inference.tiles import Tiling

    image = picture(size=(150, 90))
    tiled = Detector(model, device="cpu", threshold=0.0, tiles=64, tile_overlap=0.5).detect(image)
    (expected,) = Predictor(loaded, device="cpu", tiles=Tiling(64, 0.5)).predict([image])
    assert [one.score for one in tiled] == expected.scores.tolist()
    with pytest.raises(UsageError, match="too small"):
        Detector(model, device="cpu", tiles=10)
