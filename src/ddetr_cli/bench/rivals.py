"""Ours and the programs people would use instead: the same weights and pixels, in turns, answers compared.

Timed is a prepared batch to detections on the CPU for everyone; ratios are made within rounds. Random weights decide
the answers but not the time; answers are compared before any threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ddetr_cli.bench.machine import peer_versions
from ddetr_cli.bench.options import RIVALS, BenchOptions
from ddetr_cli.bench.peers import REQUIREMENTS, TRANSFORMERS, Answer, Peer, build_pair, build_peers, missing_packages
from ddetr_cli.bench.subjects import Subject, open_model, random_pixels
from ddetr_cli.bench.tables import Listener, Table, middle_half, milliseconds, peer_notes, times_as
from ddetr_cli.bench.timing import Samples, noise_notes, time_interleaved
from ddetr_cli.errors import UsageError
from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.model.postprocess import decode


@dataclass(frozen=True)
class RivalResult:
    """One program: seconds of a batch, and how far its answer is from the reference's."""

    program: str
    is_ours: bool
    times: Samples
    logits_error: float
    boxes_error: float


@dataclass(frozen=True)
class RivalsSection:
    """One model in every program."""

    model: str
    reference: str
    largest_logit: float
    results: tuple[RivalResult, ...]
    absent: dict[str, str]  # program -> why it was not measured
    versions: dict[str, str | None]
    key: str = RIVALS

    def ours(self) -> list[RivalResult]:
        """Our precisions."""
        return [result for result in self.results if result.is_ours]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; ratios are of times, rival over ours."""
        return {
            "model": self.model,
            "reference": self.reference,
            "largest_logit": self.largest_logit,
            "programs": [
                {
                    "program": result.program,
                    "seconds": result.times.to_json(),
                    "logits_error": result.logits_error,
                    "boxes_error": result.boxes_error,
                    "ratios": {ours.program: result.times.over(ours.times).to_json() for ours in self.ours()},
                }
                for result in self.results
            ],
            "absent": self.absent,
            "versions": self.versions,
        }

    def tables(self) -> list[Table]:
        """One row per program."""
        ours = self.ours()
        rows = [
            (
                result.program,
                milliseconds(result.times.median),
                middle_half(result.times),
                *("" if result is other else times_as(result.times.over(other.times)) for other in ours),
                f"{result.logits_error:.1e}",
                f"{result.boxes_error:.1e}",
            )
            for result in self.results
        ]
        headings = ("program", "median ms", "quartiles", *(f"/ {other.program}" for other in ours))
        return [
            Table(
                f"{self.model} and its rivals",
                (*headings, "logits error", "boxes error"),
                tuple(rows),
                notes=(
                    "/: times as long as ours, median and quartiles of the rounds' ratios",
                    f"error: largest difference to {self.reference}, whose largest logit is {self.largest_logit:.2f}",
                    *peer_notes(self.versions, self.absent),
                    *noise_notes({result.program: result.times for result in self.results}),
                ),
            )
        ]


def measure_rivals(options: BenchOptions, listener: Listener) -> list[RivalsSection]:
    """Every model of ``options`` in ours and in every peer that is installed, on the CPU.

    Raises UsageError for models that have no counterpart.
    """
    if options.device not in ("auto", "cpu"):
        raise UsageError(f"--rivals: compares on the CPU only, not on {options.device}. Add --device cpu.")
    return [_compare(name, options, listener) for name in options.models]


def _compare(name: str, options: BenchOptions, listener: Listener) -> RivalsSection:
    missing = {program: missing_packages(program) for program in REQUIREMENTS}
    absent = {program: f"not installed: {', '.join(names)}" for program, names in missing.items() if names}
    pixels = random_pixels(options.size_hw, options.batch_size)
    with TemporaryDirectory(prefix="ddetr-bench-") as folder, torch.inference_mode():
        if TRANSFORMERS in absent:
            model, peers = open_model(name, listener), list[Peer]()
        else:
            theirs, model = build_pair(name, Path(folder))
            wanted = [program for program in REQUIREMENTS if program not in absent]
            peers, failures = build_peers(theirs, pixels, Path(folder), wanted, listener)
            absent |= failures
        subjects = [
            Subject(model, precision, torch.device("cpu"), pixels, listener) for precision in options.precisions
        ]
        ours = {f"ddetr {subject.precision}": subject for subject in subjects}
        answers = {peer.name: peer.run() for peer in peers} | {label: s.answer() for label, s in ours.items()}
        reference, (logits, boxes) = next(iter(answers.items()))
        sizes_hw = [options.size_hw] * options.batch_size

        def to_detections(run: Callable[[], Answer]) -> Callable[[], object]:
            return lambda: decode(model.config.family, DetectorOutput(*run()), sizes_hw)

        runs: dict[str, Callable[[], object]] = {label: subject.run for label, subject in ours.items()}
        runs |= {peer.name: to_detections(peer.run) for peer in peers}
        listener.expect(len(runs) * (options.warmup + options.rounds))
        time_interleaved(runs, options.warmup, on_run=listener.ran)
        times = time_interleaved(runs, options.rounds, on_run=listener.ran)
    results = tuple(
        RivalResult(
            program,
            program in ours,
            times[program],
            float((answers[program][0] - logits).abs().max()),
            float((answers[program][1] - boxes).abs().max()),
        )
        for program in runs
    )
    return RivalsSection(name, reference, float(logits.abs().max()), results, absent, peer_versions())
