"""Where the time of one picture goes: from the file, through the parts of the model, to the files written.

A part that runs within another (heads between decoder layers) is counted once, as its own; what runs in the model
outside all of them (positions, references, reshaping) is "rest of the model". So the stages sum to the whole, and
nothing is counted twice. They run one after the other here; in a folder run ``detect`` does reading and writing
beside the model. How near a model is to its floor is asked of whole runs, timed in the same rounds without any
stopwatch inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ddetr_cli.bench.ceilings import PYTORCH, Ceilings, ceiling_probes
from ddetr_cli.bench.clock import REST, PartClock, model_parts
from ddetr_cli.bench.flops import ModelSize, measure_size
from ddetr_cli.bench.options import STAGES, BenchOptions
from ddetr_cli.bench.subjects import BenchModel, Subject
from ddetr_cli.bench.tables import Listener, Table, milliseconds, percent
from ddetr_cli.bench.timing import Samples, noise_notes, time_interleaved, warm_up
from ddetr_cli.classes import ClassTable
from ddetr_cli.data.images import read_image
from ddetr_cli.data.pixels import to_pixels
from ddetr_cli.inference.detections import ImageDetections
from ddetr_cli.inference.preparation import Prepared
from ddetr_cli.model.postprocess import decode

# The photograph, as a share of what the model sees of it: COCO's 640x480 for the usual 800x1066.
_PHOTO_SCALE = 0.6
# Boxes drawn: a busy picture. Random weights find nothing worth a threshold.
DRAWN_BOXES = 20

_FLOOR_NOTE = (
    "floor: multiply-adds at the rate of the best convolution, PyTorch's or of the engine that inference runs on, "
    "and the encoder's deformable attention at its rate on a cached value; floor / time: the median of "
    "the rounds' shares, with quartiles; by PyTorch's: the same by the rate of its convolutions alone"
)


class Finisher(Protocol):
    """How a command finishes a picture."""

    def draw(self, picture: Image.Image, found: ImageDetections) -> Any:
        """What is to be written of a picture, drawn and encoded."""

    def write(self, drawn: Any) -> None:
        """Write what ``draw`` gave."""

    def close(self) -> None:
        """Nothing more comes."""


# Stages around the model and its post-processing.
BEFORE_MODEL, AFTER_MODEL = ("image decoding", "preprocessing"), ("drawing", "writing")
POST_PROCESSING = "post-processing"

# A finisher for a model with these classes, writing into this folder.
Finishing = Callable[[ClassTable, Path], Finisher]


@dataclass(frozen=True)
class StageResult:
    """One model in one precision: seconds of each stage of one picture, and of the model alone."""

    name: str
    precision: str
    stages: dict[str, Samples]
    whole: Samples  # prepared picture to detections, no stopwatch inside
    size: ModelSize
    floor: Samples
    pytorch_floor: Samples  # by the convolutions of PyTorch alone

    @property
    def model_seconds(self) -> float:
        """The stages of the model together, post-processing with them: what ``whole`` times without a stopwatch."""
        return sum(taken.median for stage, taken in self.stages.items() if stage not in (*BEFORE_MODEL, *AFTER_MODEL))

    @property
    def floor_share(self) -> Samples:
        """The floor as a share of the time taken in the same round: 1 is perfect."""
        return self.floor.over(self.whole)


@dataclass(frozen=True)
class StagesSection:
    """The breakdowns, and the ceilings they are held against."""

    size_hw: tuple[int, int]
    results: tuple[StageResult, ...]
    ceilings: Ceilings
    key: str = STAGES

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; seconds of one picture."""
        return {
            "models": [
                {
                    "name": result.name,
                    "precision": result.precision,
                    "stages": {stage: samples.to_json() for stage, samples in result.stages.items()},
                    "model": result.whole.to_json(),
                    "flops": result.size.flops,
                    "floor": result.floor.to_json(),
                    "floor_share": result.floor_share.to_json(),
                    "floor_share_by_pytorch": result.pytorch_floor.over(result.whole).to_json(),
                }
                for result in self.results
            ],
            "ceilings": self.ceilings.to_json(),
        }

    def tables(self) -> list[Table]:
        """Stages by model, the floors, the ceilings."""
        height, width = self.size_hw
        labels = [f"{result.name} {result.precision}" for result in self.results]
        names = list(dict.fromkeys(stage for result in self.results for stage in result.stages))
        totals = [sum(samples.median for samples in result.stages.values()) for result in self.results]

        def cells(stage: str) -> list[str]:
            row = []
            for result, total in zip(self.results, totals, strict=True):
                taken = result.stages.get(stage)
                row += ["", ""] if taken is None else [milliseconds(taken.median), f"{taken.median / total:.1%}"]
            return row

        stage_rows = [(stage, *cells(stage)) for stage in names]
        stage_rows.append(("sum", *(cell for total in totals for cell in (milliseconds(total), "100%"))))
        floors = tuple(
            (
                label,
                milliseconds(result.whole.median),
                f"{result.size.flops / 1e9:.1f}",
                f"{self.ceilings.peak(result.precision) / 1e9:.0f}",
                self.ceilings.peak_of(result.precision),
                milliseconds(result.floor.median),
                percent(result.floor_share),
                percent(result.pytorch_floor.over(result.whole)),
            )
            for label, result in zip(labels, self.results, strict=True)
        )
        noted = {
            f"{label}{what}": samples
            for label, result in zip(labels, self.results, strict=True)
            for what, samples in (("", result.whole), (", share", result.floor_share))
        }
        return [
            Table(
                f"stages of one picture of {height}x{width}, one after the other",
                ("stage", *(heading for label in labels for heading in (f"{label} ms", "share"))),
                tuple(stage_rows),
                notes=(
                    "medians; preprocessing: resizing and normalising; rest of the model: positions, reshaping",
                    f"drawing: {DRAWN_BOXES} boxes, and the JPEG",
                    *(
                        f"{label}: model and post-processing sum to {milliseconds(result.model_seconds)} ms; "
                        f"without a stopwatch inside they take {milliseconds(result.whole.median)} ms"
                        for label, result in zip(labels, self.results, strict=True)
                    ),
                ),
            ),
            Table(
                "model against its floor",
                (
                    "model",
                    "median ms",
                    "GFLOPs",
                    "peak GFLOP/s",
                    "reached by",
                    "floor ms",
                    "floor / time",
                    "by PyTorch's",
                ),
                floors,
                notes=(_FLOOR_NOTE, *noise_notes(noted)),
            ),
            self.ceilings.table(),
        ]


def measure_stages(
    options: BenchOptions,
    models: Sequence[BenchModel],
    device: torch.device,
    finishing: Finishing,
    listener: Listener,
) -> StagesSection:
    """Break one picture down for every model and precision of ``options``. Raises DeviceError."""
    with TemporaryDirectory(prefix="ddetr-bench-") as folder:
        photo = _write_photo(Path(folder), options.size_hw)
        pixels = to_pixels(read_image(photo), options.size_hw)[None]
        subjects = [
            Subject(model, precision, device, pixels, listener)
            for model in models
            for precision in options.precisions
        ]
        runs = {f"{subject.model.name}, {subject.asked}": subject.run for subject in subjects}
        finishers = [finishing(subject.model.classes, Path(folder)) for subject in subjects]
        configs = [subject.model.config for subject in subjects]
        precisions = list(dict.fromkeys(subject.precision for subject in subjects))
        with torch.inference_mode():
            probes = ceiling_probes(options.size_hw, configs, precisions, 1, device)
            calls = {name: _waiting(run, device) for name, run in (runs | probes).items()}
            repeats = warm_up(calls, options.warmup)
            for subject, finisher in zip(subjects, finishers, strict=True):
                _one_picture(photo, subject, options.size_hw, device, finisher)  # loads fonts and codecs
            listener.expect((len(calls) + len(subjects)) * options.rounds)
            rounds: list[list[dict[str, float]]] = [[] for _ in subjects]

            def look_inside() -> None:
                for subject, finisher, taken in zip(subjects, finishers, rounds, strict=True):
                    taken.append(_one_picture(photo, subject, options.size_hw, device, finisher))
                    listener.ran()

            measured = time_interleaved(
                calls, options.rounds, repeats=repeats, on_run=listener.ran, on_round=look_inside
            )
        for finisher in finishers:
            finisher.close()
    ceilings = Ceilings(options.size_hw, {name: measured[name] for name in probes})
    results = []
    for (name, _), subject, taken in zip(runs.items(), subjects, rounds, strict=True):
        size = measure_size(subject.model.model, options.size_hw)
        stages = {stage: Samples(tuple(one.get(stage, 0.0) for one in taken)) for stage in taken[0]}
        floors = [ceilings.floor(subject.model.config, size, subject.precision, by) for by in ("", PYTORCH)]
        results.append(StageResult(subject.model.name, subject.precision, stages, measured[name], size, *floors))
    return StagesSection(options.size_hw, tuple(results), ceilings)


def _one_picture(
    photo: Path, subject: Subject, size_hw: tuple[int, int], device: torch.device, finisher: Finisher
) -> dict[str, float]:
    """Seconds of each stage, in the order they run."""
    clock = PartClock(device)
    with clock.part("image decoding"):
        picture = read_image(photo)
    with clock.part("preprocessing"):
        prepared = Prepared(to_pixels(picture, size_hw), (picture.height, picture.width))
    model = subject.model.model
    with clock.watching(model_parts(model), subject.predictor.fast), clock.part(REST):
        output = subject.predictor.forward(prepared.pixels[None])
    with clock.part(POST_PROCESSING):
        (found,) = decode(model.config.family, output, [prepared.size_hw])
    kept = ImageDetections(found.boxes_xyxy_px[:DRAWN_BOXES], found.scores[:DRAWN_BOXES], found.labels[:DRAWN_BOXES])
    with clock.part("drawing"):
        drawn = finisher.draw(picture, kept)
    with clock.part("writing"):
        finisher.write(drawn)
    seconds = clock.take()
    last = (REST, POST_PROCESSING, *AFTER_MODEL)
    return {stage: seconds[stage] for stage in (*(s for s in seconds if s not in last), *last)}


def _waiting(run: Any, device: torch.device) -> Any:
    def wait() -> None:
        run()
        torch.cuda.synchronize(device)

    return run if device.type == "cpu" else wait


def _write_photo(folder: Path, size_hw: tuple[int, int]) -> Path:
    """A JPEG with as much detail as a photograph has: noise of every scale, smaller the finer it is."""
    height, width = (max(1, round(side * _PHOTO_SCALE)) for side in size_hw)
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        coarse = rng.integers(0, 256, (min(cells, height), min(cells, width), 3), dtype=np.uint8)
        layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer) / np.float32(cells)
    total *= 255 / total.max()
    path = folder / "photo.jpg"
    Image.fromarray(total.astype(np.uint8)).save(path, quality=90)
    return path
