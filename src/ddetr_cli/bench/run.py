"""One measurement from options to report: open the models, take the figures that were asked for, in turns.

Nothing is downloaded for a preset: it runs with random weights.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ddetr_cli.bench.card import Scoring, TrainingHours, measure_card
from ddetr_cli.bench.flops import FLOPS_CONVENTION
from ddetr_cli.bench.folder import FolderRun, measure_folder
from ddetr_cli.bench.gpu_op import measure_gpu_op
from ddetr_cli.bench.latency import LATENCY_CONVENTION, measure_latency
from ddetr_cli.bench.machine import describe_machine, describe_versions
from ddetr_cli.bench.op import measure_op
from ddetr_cli.bench.options import (
    CARD,
    FOLDER,
    LATENCY,
    OP,
    RIVALS,
    SCALING,
    SIZES,
    STAGES,
    TRAIN,
    BenchOptions,
)
from ddetr_cli.bench.rivals import measure_rivals
from ddetr_cli.bench.scaling import measure_scaling
from ddetr_cli.bench.sizes import measure_sizes
from ddetr_cli.bench.stages import Finishing, measure_stages
from ddetr_cli.bench.subjects import open_model
from ddetr_cli.bench.tables import Listener, Section, Silence, Table
from ddetr_cli.bench.training import TrainingSection, TrainingSteps, measure_training
from ddetr_cli.errors import DeviceError
from ddetr_cli.inference.device import resolve_device
from ddetr_cli.ops import KernelStatus, kernel_status


@dataclass(frozen=True)
class BenchReport:
    """All that is needed to read the figures, and to take them again."""

    options: BenchOptions
    machine: dict[str, Any]
    versions: dict[str, str]
    kernels: KernelStatus
    created: str
    sections: tuple[Section, ...]

    def tables(self) -> list[Table]:
        """Those of every section."""
        return [table for section in self.sections for table in section.tables()]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with every sample; times in seconds."""
        options = self.options
        return {
            "format": 2,
            "created": self.created,
            "input": {
                "height": options.size_hw[0],
                "width": options.size_hw[1],
                "batch_size": options.batch_size,
                "precisions": list(options.precisions),
            },
            "rounds": options.rounds,
            "warmup": options.warmup,
            "conventions": {"flops": FLOPS_CONVENTION, "latency": LATENCY_CONVENTION},
            "machine": self.machine,
            "versions": self.versions,
            "kernels": asdict(self.kernels),
            # Of a measurement that is taken for each model on its own there are several.
            "measurements": [{"kind": section.key, "result": section.to_json()} for section in self.sections],
        }


def run_bench(
    options: BenchOptions,
    *,
    listener: Listener | None = None,
    finishing: Finishing | None = None,
    run_folder: FolderRun | None = None,
    score: Scoring | None = None,
    training: TrainingSteps | None = None,
) -> BenchReport:
    """Take the measurements of ``options`` on this machine.

    ``finishing``, how ``detect`` draws and writes, is needed for stages; ``run_folder``, how it runs, for a folder;
    with ``score``, how ``eval`` scores, the card has measured APs; ``training``, the step of ``train``, is needed for
    that.
    Raises CheckpointError for a model that cannot be found or read, DeviceError for a device that is absent or whose
    memory is too small, UsageError and DatasetError for options that do not fit the models or the data.
    """
    listener = Silence() if listener is None else listener
    device = resolve_device(options.device, on_notice=listener.notice)
    machine = describe_machine(device)  # its load is that of the others, before ours
    needs_models = not {SIZES, LATENCY, STAGES, FOLDER, CARD, SCALING}.isdisjoint(options.measurements)
    models = [open_model(name, listener) for name in options.models] if needs_models else []
    sections: list[Section] = []
    try:
        # Training steps come first: the card quotes the hours that they project.
        for measurement in sorted(options.measurements, key=lambda name: name != TRAIN):
            if measurement == SIZES:
                sections.append(measure_sizes(options, models, listener))
            elif measurement == LATENCY:
                sections.append(measure_latency(options, models, device, listener))
            elif measurement == OP:
                measure = measure_gpu_op if device.type == "cuda" else measure_op
                sections.append(measure(options, device, listener))
            elif measurement == STAGES:
                assert finishing is not None
                sections.append(measure_stages(options, models, device, finishing, listener))
            elif measurement == FOLDER:
                assert run_folder is not None
                sections.append(measure_folder(options, models, device, run_folder, listener))
            elif measurement == CARD:
                timed = [section for section in sections if isinstance(section, TrainingSection)]
                hours = {section.model: TrainingHours(*section.shortest_hours()) for section in timed}
                sections.append(measure_card(options, models, device, listener, score, hours))
            elif measurement == SCALING:
                sections.append(measure_scaling(options, models, device, listener))
            elif measurement == RIVALS:
                sections += measure_rivals(options, listener)
            elif measurement == TRAIN:
                assert training is not None
                sections += measure_training(options, training, listener)
    except (torch.OutOfMemoryError, MemoryError) as error:
        height, width = options.size_hw
        raise DeviceError(
            f"device {device}: out of memory ({options.batch_size} of {width}x{height} px). "
            "Use a smaller --image-size or --batch-size, or fewer --models."
        ) from error
    return BenchReport(
        options=options,
        machine=machine,
        versions=describe_versions(),
        kernels=kernel_status(),
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        sections=tuple(sections),
    )
