"""One measurement from options to report: build the models, weigh them, warm them up, time them in turns.

Timed is what a model costs, from a normalised batch on the device to scored boxes on the CPU; reading, resizing and
drawing pictures is not. Presets run with random weights: speed does not depend on them, and nothing is downloaded.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ddetr_cli.bench.flops import FLOPS_CONVENTION, ModelSize, measure_size
from ddetr_cli.bench.machine import describe_machine, describe_versions
from ddetr_cli.bench.options import BenchOptions
from ddetr_cli.bench.timing import Latency, time_interleaved
from ddetr_cli.errors import DeviceError
from ddetr_cli.inference.device import resolve_device
from ddetr_cli.model.detector import DeformableDetr, build_detector
from ddetr_cli.model.postprocess import postprocess
from ddetr_cli.ops import KernelStatus, kernel_status
from ddetr_cli.presets import PRESETS, get_preset
from ddetr_cli.weights import load_model

LATENCY_CONVENTION = "model and post-processing of one batch, normalised pixels on the device to boxes on the CPU"
RANDOM_WEIGHTS = "random"

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model; ``weights`` is ``random`` or the file they came from."""

    name: str
    preset: str
    weights: str
    size: ModelSize
    latency: Latency
    peak_device_memory: int | None  # bytes, CUDA only

    def images_per_second(self, batch_size: int) -> float:
        """At the median latency."""
        return batch_size / self.latency.median


@dataclass(frozen=True)
class BenchReport:
    """All that is needed to read the figures, and to take them again."""

    options: BenchOptions
    machine: dict[str, Any]
    versions: dict[str, str]
    kernels: KernelStatus
    created: str
    models: tuple[ModelResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; latencies in seconds and of one batch, FLOPs of one picture."""
        options = self.options
        return {
            "format": 1,
            "created": self.created,
            "input": {
                "height": options.size_hw[0],
                "width": options.size_hw[1],
                "batch_size": options.batch_size,
                "precision": options.precision,
            },
            "rounds": options.rounds,
            "warmup": options.warmup,
            "conventions": {"flops": FLOPS_CONVENTION, "latency": LATENCY_CONVENTION},
            "machine": self.machine,
            "versions": self.versions,
            "kernels": asdict(self.kernels),
            "models": [
                {
                    "name": model.name,
                    "preset": model.preset,
                    "weights": model.weights,
                    "parameters": model.size.parameters,
                    "trainable_parameters": model.size.trainable_parameters,
                    "flops": model.size.flops,
                    "flops_by_operation": model.size.flops_by_operation,
                    "latency_s": {
                        "median": model.latency.median,
                        "p90": model.latency.p90,
                        "min": model.latency.fastest,
                        "samples": list(model.latency.seconds),
                    },
                    "images_per_second": model.images_per_second(options.batch_size),
                    "peak_device_memory_bytes": model.peak_device_memory,
                }
                for model in self.models
            ],
        }


def run_bench(
    options: BenchOptions,
    *,
    on_run: Callable[[], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure the models of ``options`` on this machine. ``on_run`` is called after every timed or warm-up run.

    ``on_notice`` is told of downloads, and of what a model file or the device could not do.

    Raises CheckpointError for a model that cannot be found or read, DeviceError for a device that is absent or whose
    memory is too small.
    """
    device = resolve_device(options.device, on_notice=on_notice)
    torch.manual_seed(0)
    subjects = [_Subject(name, options, device, on_notice) for name in options.models]
    machine = describe_machine(device)  # its load is that of the others, before ours
    try:
        for subject in subjects:
            subject.warm_up(on_run)
        latencies = time_interleaved({s.name: s.run for s in subjects}, options.rounds, on_run=on_run)
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
        models=tuple(subject.result(latencies[subject.name]) for subject in subjects),
    )


class _Subject:
    """One model with its input, ready to run."""

    def __init__(
        self, name: str, options: BenchOptions, device: torch.device, on_notice: Callable[[str], None] | None
    ) -> None:
        self.name, self.options, self.device = name, options, device
        model, self.weights = _model_called(name, on_notice)
        self.size = measure_size(model.eval(), options.size_hw)
        self.model = model.to(device)
        height, width = options.size_hw
        self.pixels = torch.randn(options.batch_size, 3, height, width).to(device)
        self.is_padding = torch.zeros(options.batch_size, height, width, dtype=torch.bool, device=device)
        self.peak_memory: int | None = None

    @torch.inference_mode()
    def run(self) -> None:
        """One batch, to boxes on the CPU."""
        dtype = _AUTOCAST_DTYPES.get(self.options.precision)
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype):
            out = self.model(self.pixels, self.is_padding)
        sizes_hw = [self.options.size_hw] * self.options.batch_size
        # Copying to the CPU waits for the device, so the clock stops when the result is there.
        postprocess(out.logits.float().cpu(), out.boxes_cxcywh.float().cpu(), sizes_hw)

    def warm_up(self, on_run: Callable[[], None] | None) -> None:
        """Untimed runs: the first ones load kernels and fill caches."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(self.options.warmup):
            self.run()
            if on_run is not None:
                on_run()
        if self.device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(self.device)

    def result(self, latency: Latency) -> ModelResult:
        """What was found out."""
        return ModelResult(self.name, self.model.config.preset, self.weights, self.size, latency, self.peak_memory)


def _model_called(name: str, on_notice: Callable[[str], None] | None) -> tuple[DeformableDetr, str]:
    """The model and where its weights came from. A preset never looks for its weights."""
    if name in PRESETS:
        return build_detector(get_preset(name)), RANDOM_WEIGHTS
    loaded = load_model(name, announce=on_notice)
    for note in loaded.report.notes:
        if on_notice is not None:
            on_notice(note)
    return loaded.model, str(loaded.source)
