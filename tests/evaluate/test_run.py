from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ddetr_cli.classes import ClassTable
from ddetr_cli.data.records import CocoAnnotations, CocoCategory
from ddetr_cli.errors import DatasetError, DeviceError
from ddetr_cli.evaluate.mapping import map_classes
from ddetr_cli.evaluate.run import predict_images
from ddetr_cli.evaluate.table import Detection
from ddetr_cli.inference.preparation import Prepared

Truth = Callable[..., CocoAnnotations]
BOX = (10.0, 20.0, 30.0, 40.0)
TABLE = ClassTable((1, 2), ("cat", "cow"))


@dataclass
class Found:
    boxes_xyxy_px: Tensor
    scores: Tensor
    labels: Tensor
    dropped: int


@dataclass
class ScriptedPredictor:
    """Gives the same rows for every image and records the images it was shown."""

    rows: list[tuple[tuple[float, float, float, float], float, int]]
    dropped: int = 0
    batches: list[list[tuple[int, int]]] = field(default_factory=list)
    device = torch.device("cpu")

    def prepare(self, image: Image.Image) -> Prepared:
        return Prepared(torch.zeros(0), (image.height, image.width))

    def predict_prepared(self, images: Sequence[Prepared]) -> list[Found]:
        self.batches.append([image.size_hw for image in images])
        boxes, scores, labels = zip(*self.rows, strict=True)
        return [Found(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels), self.dropped) for _ in images]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    exif = Image.Exif()
    exif[274] = 6
    for index in (1, 2, 3):
        Image.new("RGB", (640, 480), (index, 0, 0)).save(tmp_path / f"{index}.jpg", exif=exif, quality=100)
    return tmp_path


def test_detections_come_in_the_data_sets_ids_as_xywh_image_by_image(images: Path, truth: Truth) -> None:
    ground_truth = truth((3, 17, BOX), (1, 17, BOX), (2, 17, BOX), categories=(CocoCategory(17, "cat"),))
    predictor = ScriptedPredictor([((-1.0, 2.0, 10.5, 5.0), 0.75, 0)])
    mapping = map_classes(TABLE, ground_truth.categories)
    results = list(predict_images(predictor, ground_truth, images, mapping, batch_size=2))
    assert [result.image.id for result in results] == [3, 1, 2]
    assert [result.detections for result in results] == [
        [Detection(image, 17, (-1.0, 2.0, 11.5, 3.0), 0.75)] for image in (3, 1, 2)
    ]
    assert [len(batch) for batch in predictor.batches] == [2, 1]


def test_photos_are_shown_as_stored_without_turning_them_by_exif(images: Path, truth: Truth) -> None:
    ground_truth = truth((1, 17, BOX), categories=(CocoCategory(17, "cat"),))
    predictor = ScriptedPredictor([(BOX, 0.5, 0)])
    list(predict_images(predictor, ground_truth, images, map_classes(TABLE, ground_truth.categories)))
    assert predictor.batches == [[(480, 640)]]  # height, width


def test_a_predicted_class_without_counterpart_stops_or_is_left_out_and_counted(images: Path, truth: Truth) -> None:
    ground_truth = truth((1, 17, BOX), categories=(CocoCategory(17, "cat"),))
    mapping = map_classes(TABLE, ground_truth.categories)
    predictor = ScriptedPredictor([(BOX, 0.9, 1), (BOX, 0.5, 0)])
    with pytest.raises(DatasetError, match="class 'cow'"):
        list(predict_images(predictor, ground_truth, images, mapping))
    (result,) = predict_images(predictor, ground_truth, images, mapping, map_missing="drop")
    assert [detection.score for detection in result.detections] == [0.5]
    assert result.unmapped == 1


def test_detections_the_predictor_dropped_as_not_finite_are_counted(images: Path, truth: Truth) -> None:
    ground_truth = truth((1, 17, BOX), categories=(CocoCategory(17, "cat"),))
    predictor = ScriptedPredictor([(BOX, 0.5, 0)], dropped=2)
    (result,) = predict_images(predictor, ground_truth, images, map_classes(TABLE, ground_truth.categories))
    assert len(result.detections) == 1
    assert result.non_finite == 2


def test_an_unreadable_image_refuses_the_data_set(images: Path, truth: Truth) -> None:
    (images / "2.jpg").write_bytes(b"")
    ground_truth = truth((1, 17, BOX), (2, 17, BOX), categories=(CocoCategory(17, "cat"),))
    predictor = ScriptedPredictor([(BOX, 0.5, 0)])
    with pytest.raises(DatasetError, match=r"2.jpg: .*empty.*\(image 2 of the data set\)"):
        list(predict_images(predictor, ground_truth, images, map_classes(TABLE, ground_truth.categories)))


def test_a_device_that_has_too_little_memory_ends_the_evaluation(images: Path, truth: Truth) -> None:
    class Full(ScriptedPredictor):
        def predict_prepared(self, images: Sequence[Prepared]) -> list[Found | DeviceError]:  # type: ignore[override]
            return [DeviceError("device cuda:0: out of memory.")]

    ground_truth = truth((1, 17, BOX), categories=(CocoCategory(17, "cat"),))
    with pytest.raises(DeviceError, match="out of memory"):
        list(predict_images(Full([]), ground_truth, images, map_classes(TABLE, ground_truth.categories)))
