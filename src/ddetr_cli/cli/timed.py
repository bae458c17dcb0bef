"""What ``bench`` measures of the other commands, as they do it: how detect finishes pictures, how eval
scores, how train learns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ddetr_cli.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from PIL.Image import Image
    from torch import Tensor

    from ddetr_cli.bench.subjects import BenchModel
    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.results import ImageResult, Sink
    from ddetr_cli.detect.sources import Input
    from ddetr_cli.inference.detections import ImageDetections
    from ddetr_cli.inference.predictor import Predictor
    from ddetr_cli.model.detector import DetectionModel, DetectorOutput
    from ddetr_cli.train.matcher import Target


class DetectFinisher:
    """``detect``'s own way of finishing a picture, for the breakdown into stages."""

    def __init__(self, classes: ClassTable, folder: Path) -> None:
        from ddetr_cli.detect.sinks.assemble import make_sinks

        self._classes = classes
        self._sinks: list[Sink] = make_sinks(folder, ("coco", "images"), classes, {})
        self._input = _input(folder / "photo.jpg")

    def draw(self, picture: Image, found: ImageDetections) -> tuple[ImageResult, list[bytes | None]]:
        result = self._result(picture, found)
        return result, [sink.render and sink.render(result, picture) for sink in self._sinks]

    def write(self, drawn: tuple[ImageResult, list[bytes | None]]) -> None:
        result, files = drawn
        for sink, file in zip(self._sinks, files, strict=True):
            sink.add(result, file)

    def close(self) -> None:
        for sink in self._sinks:
            sink.abandon()

    def _result(self, picture: Image, found: ImageDetections) -> ImageResult:
        from ddetr_cli.detect.results import ImageResult

        boxes = [tuple(box) for box in found.boxes_xyxy_px.tolist()]
        return ImageResult(self._input, 1, picture.size, boxes, found.scores.tolist(), found.labels.tolist())


def _input(path: Path) -> Input:
    from ddetr_cli.detect.sources import Input

    return Input(path, path.name)


class DetectFolder:
    """``ddetr detect`` over a folder, into a folder that is thrown away. Raises NothingUsableError, UsageError."""

    def __init__(self, folder: Path) -> None:
        from ddetr_cli.detect.sources import find_inputs

        self.folder = folder
        self._inputs = find_inputs([str(folder)]).images

    @property
    def pictures(self) -> Sequence[Path]:
        return [item.path for item in self._inputs]

    def __call__(self, predictor: Predictor, on_picture: Callable[[], None], *, draws: bool) -> None:
        from tempfile import TemporaryDirectory

        from ddetr_cli.data.formats import MAX_PIXELS
        from ddetr_cli.detect.run import detect_images
        from ddetr_cli.detect.selection import Selection
        from ddetr_cli.detect.sinks.assemble import make_sinks

        with TemporaryDirectory(prefix="ddetr-bench-") as name:
            output = Path(name)
            detect_images(
                self._inputs,
                predictor,
                make_sinks(output, ("coco", "images") if draws else ("coco",), predictor.classes, {}),
                selection=Selection(),
                max_pixels=MAX_PIXELS,
                draft=predictor.tolerates_draft,
                on_result=lambda _: on_picture(),
            )


class EvalScores:
    """``ddetr eval`` of models on a data set in COCO format. Raises UsageError for one without pictures."""

    def __init__(self, data: Path) -> None:
        from ddetr_cli.data.coco import locate_dataset, read_split

        paths = locate_dataset(data, purpose="eval")
        if paths.images is None:
            raise UsageError(
                f"--val2017 {data}: its folder of images was not found. Give the folder that holds both."
            )
        self._images = paths.images
        self._ground_truth = read_split(paths)

    def __call__(self, model: BenchModel, precision: str, device: torch.device) -> Mapping[str, float | None]:
        from ddetr_cli.evaluate.mapping import map_classes
        from ddetr_cli.evaluate.metrics import evaluate_detections
        from ddetr_cli.evaluate.run import predict_images
        from ddetr_cli.inference.predictor import Predictor

        mapping = map_classes(model.classes, self._ground_truth.categories, mismatch=CheckpointError)
        predictor = Predictor(model, device=device, precision=precision)
        results = predict_images(predictor, self._ground_truth, self._images, mapping, map_missing="drop")
        detections = [detection for result in results for detection in result.detections]
        return evaluate_detections(self._ground_truth, detections).overall


class TrainSteps:
    """``train``'s own step and loss, on objects made up."""

    def step(self, model: DetectionModel, precision: str, pixels: Tensor, objects: int) -> Callable[[], float]:
        import torch

        from ddetr_cli.train.criterion import Criterion
        from ddetr_cli.train.dataset import Batch
        from ddetr_cli.train.loop import Trainer
        from ddetr_cli.train.recipe import paper_recipe, parameter_groups

        recipe = paper_recipe(batch_size=len(pixels), precision=precision)
        groups = parameter_groups(model, recipe)
        trainer = Trainer(model, Criterion(model.config.family), recipe, groups, torch.device("cpu"))
        trainer.train_mode()
        batch = Batch(pixels, None, _made_up(len(pixels), objects))
        return lambda: trainer.step([batch]).loss

    def loss(self, family: str, batch_size: int, objects: int) -> Callable[[DetectorOutput], Tensor]:
        from ddetr_cli.train.criterion import Criterion

        criterion, targets = Criterion(family), _made_up(batch_size, objects)
        return lambda output: criterion(output, targets)[0]


def _made_up(batch_size: int, objects: int) -> list[Target]:
    import torch

    from ddetr_cli.train.matcher import Target

    numbers = torch.Generator().manual_seed(1)
    boxes = torch.rand(batch_size, objects, 4, generator=numbers) * 0.3 + torch.tensor([0.35, 0.35, 0.02, 0.02])
    return [Target(torch.arange(1, objects + 1), of_one) for of_one in boxes]
