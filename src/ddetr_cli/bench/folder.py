"""A whole folder, from image files to result files, against the same model with nothing around it.

The pure rate is that of pictures read and prepared beforehand; both are measured in the same rounds. What a run of
pictures costs beyond its model is then visible as a share, and whether memory grows with the number of pictures too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ddetr_cli.bench.machine import resident_bytes
from ddetr_cli.bench.options import FOLDER, BenchOptions
from ddetr_cli.bench.subjects import BenchModel
from ddetr_cli.bench.tables import Listener, Table, middle_half, milliseconds, times_as
from ddetr_cli.bench.timing import Samples, noise_notes, time_interleaved
from ddetr_cli.data.images import read_image
from ddetr_cli.errors import DeviceError, ImageError, NothingUsableError
from ddetr_cli.inference.predictor import Predictor

if TYPE_CHECKING:
    from PIL.Image import Image

# So many pictures, spread over the folder, stand for all of them in the pure rate: their pixels are kept in memory.
SAMPLE_PICTURES = 16
# By then everything that is allocated once has been.
SETTLED_PICTURES = 50
# What a run writes: COCO results alone, or pictures with boxes too, which takes decoding and encoding every pixel.
BOXES, PICTURES = "boxes", "boxes, pictures"
OUTPUTS = (BOXES, PICTURES)


class FolderRun(Protocol):
    """A run of a command over a folder, from files to files."""

    @property
    def folder(self) -> Path:
        """Where it reads."""

    @property
    def pictures(self) -> Sequence[Path]:
        """The files it will read."""

    def __call__(self, predictor: Predictor, on_picture: Callable[[], None], *, draws: bool) -> None:
        """Run, with ``draws`` to pictures with boxes too, and call back after each picture."""


@dataclass(frozen=True)
class FolderResult:
    """One model in one precision, written to ``output``; ``run`` and ``pure`` are seconds per picture."""

    name: str
    precision: str
    output: str
    run: Samples
    pure: Samples
    resident: tuple[int, ...]  # bytes after each picture of the last round

    @property
    def efficiency(self) -> Samples:
        """The run's rate as a share of the pure one, round by round."""
        return self.pure.over(self.run)

    @property
    def settled_peak(self) -> int:
        """Most memory up to the picture by which it should not grow any more."""
        return max(self.resident[:SETTLED_PICTURES])


@dataclass(frozen=True)
class FolderSection:
    """All models over one folder."""

    folder: Path
    pictures: int
    results: tuple[FolderResult, ...]
    key: str = FOLDER

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; seconds per picture, memory in bytes."""
        return {
            "folder": str(self.folder),
            "pictures": self.pictures,
            "models": [
                {
                    "name": result.name,
                    "precision": result.precision,
                    "output": result.output,
                    "run": result.run.to_json(),
                    "pure": result.pure.to_json(),
                    "efficiency": result.efficiency.to_json(),
                    "resident_bytes": list(result.resident),
                }
                for result in self.results
            ],
        }

    def tables(self) -> list[Table]:
        """One row per model, precision and output."""
        rows = tuple(
            (
                result.name,
                result.precision,
                result.output,
                milliseconds(result.run.median),
                middle_half(result.run),
                f"{1 / result.run.median:.2f}",
                f"{1 / result.pure.median:.2f}",
                times_as(result.efficiency),
                f"{result.settled_peak >> 20}",
                f"{max(result.resident) >> 20}",
            )
            for result in self.results
        )
        headings = (
            "model",
            "precision",
            "output",
            "ms each",
            "quartiles",
            "images/s",
            "pure images/s",
            "run / pure",
            f"MiB at {min(SETTLED_PICTURES, self.pictures)}",
            "MiB peak",
        )
        noise = noise_notes({f"{r.name} {r.precision} {r.output}": r.run for r in self.results})
        note = (
            "pure: the model alone, pictures prepared beforehand, in the same rounds; MiB: memory of the process, "
            f"the most up to picture {min(SETTLED_PICTURES, self.pictures)} and of the whole run"
        )
        return [
            Table(
                f"folder of {self.pictures} pictures, files to files",
                headings,
                rows,
                labels=3,
                notes=(note, *noise),
            )
        ]


def measure_folder(
    options: BenchOptions,
    models: Sequence[BenchModel],
    device: torch.device,
    run_folder: FolderRun,
    listener: Listener,
) -> FolderSection:
    """Run every model and precision of ``options`` over the folder, in turns with the model alone.

    Raises NothingUsableError where no picture can be read, DeviceError, and what a run raises.
    """
    subjects = [
        _Subject(model, precision, options, device, run_folder, listener)
        for model in models
        for precision in options.precisions
    ]
    runs = {name: run for subject in subjects for name, run in subject.runs().items()}
    listener.expect(len(subjects) * len(OUTPUTS) * options.rounds * len(run_folder.pictures))
    for subject in subjects:
        subject.run_pure()  # the first run loads kernels and fills caches; files stay cold no longer than that either
    times = time_interleaved(runs, options.rounds)
    results = tuple(result for subject in subjects for result in subject.results(times))
    return FolderSection(run_folder.folder, len(run_folder.pictures), results)


class _Subject:
    """One model in one precision, with the pictures prepared that stand for the folder."""

    def __init__(
        self,
        model: BenchModel,
        precision: str,
        options: BenchOptions,
        device: torch.device,
        run_folder: FolderRun,
        listener: Listener,
    ) -> None:
        self.label = f"{model.name}, {precision}"
        self.name, self.listener, self.run_folder = model.name, listener, run_folder
        self.predictor = Predictor(
            model,
            device=device,
            precision=precision,
            image_size=min(options.size_hw),
            batch_size=options.batch_size,
            on_notice=listener.notice,
        )
        self.prepared = [self.predictor.prepare(picture) for picture in _some(run_folder.pictures)]
        self.resident: dict[str, list[int]] = {}

    def runs(self) -> dict[str, Callable[[], None]]:
        """What takes turns."""
        whole = {f"{self.label} {output}": partial(self.run_all, output) for output in OUTPUTS}
        return {**whole, f"{self.label} pure": self.run_pure}

    def run_all(self, output: str) -> None:
        """The folder, from files to files."""
        resident = self.resident[output] = []

        def on_picture() -> None:
            resident.append(resident_bytes())
            self.listener.ran()

        self.run_folder(self.predictor, on_picture, draws=output == PICTURES)

    def run_pure(self) -> None:
        """The model alone, on the sample."""
        for result in self.predictor.predict_prepared(self.prepared):
            if isinstance(result, DeviceError):
                raise result

    def results(self, times: Mapping[str, Samples]) -> list[FolderResult]:
        """Seconds per picture, of each output."""
        pure = times[f"{self.label} pure"].scaled(1 / len(self.prepared))
        pictures = len(self.run_folder.pictures)
        return [
            FolderResult(
                self.name,
                self.predictor.precision,
                output,
                times[f"{self.label} {output}"].scaled(1 / pictures),
                pure,
                tuple(self.resident[output]),
            )
            for output in OUTPUTS
        ]


def _some(paths: Sequence[Path]) -> list[Image]:
    """Pictures spread evenly over ``paths``, without those that cannot be read."""
    step = max(1, len(paths) // SAMPLE_PICTURES)
    pictures = []
    for path in paths[::step][:SAMPLE_PICTURES]:
        with suppress(ImageError):
            pictures.append(read_image(path))
    if not pictures:
        raise NothingUsableError(f"{paths[0].parent}: no picture could be read. Give a folder of photographs.")
    return pictures
