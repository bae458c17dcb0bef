"""A whole measurement of the small model, and what every report holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr_cli.bench.latency import LatencySection
from ddetr_cli.bench.options import LATENCY, SIZES, BenchOptions
from ddetr_cli.bench.run import BenchReport, run_bench
from ddetr_cli.bench.subjects import OFFSET_PIXELS, open_model
from ddetr_cli.bench.tables import Silence
from ddetr_cli.classes import ClassTable
from ddetr_cli.errors import CheckpointError, DeviceError
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.model.attention import DeformableAttention
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import get_preset
from ddetr_cli.weights import save_checkpoint

QUICK: dict[str, Any] = {"size_hw": (64, 64), "device": "cpu", "rounds": 1, "warmup": 1}


class Counting(Silence):
    """A listener that counts."""

    def __init__(self) -> None:
        self.expected, self.done = 0, 0
        self.notices: list[str] = []

    def expect(self, runs: int) -> None:
        self.expected += runs

    def ran(self) -> None:
        self.done += 1

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture(scope="module")
def report() -> BenchReport:
    listener = Counting()
    report = run_bench(
        BenchOptions(
            ("tiny",), size_hw=(64, 96), batch_size=2, precisions=("fp32", "bf16"), device="cpu", rounds=3, warmup=1
        ),
        listener=listener,
    )
    # One model counted; two precisions warmed up once and run three times.
    assert listener.done == listener.expected == 1 + 2 * 4
    return report


def latency_of(report: BenchReport) -> LatencySection:
    return next(section for section in report.sections if isinstance(section, LatencySection))


def test_by_default_sizes_and_latencies_are_measured(report: BenchReport) -> None:
    assert [section.key for section in report.sections] == [SIZES, LATENCY]


def test_every_round_is_kept(report: BenchReport) -> None:
    for result in latency_of(report).results:
        assert len(result.times.values) == 3
        assert 0 < result.times.smallest <= result.times.median <= result.times.p90


def test_images_per_second_count_the_whole_batch(report: BenchReport) -> None:
    section = latency_of(report)
    result = section.results[0]
    assert section.images_per_second(result) == pytest.approx(2 / result.times.median)


def test_every_precision_is_measured_under_its_name(report: BenchReport) -> None:
    assert [result.precision for result in latency_of(report).results] == ["fp32", "bf16"]


def test_what_auto_computes_in_is_said() -> None:
    found = run_bench(BenchOptions(("tiny",), measurements=(LATENCY,), **QUICK))
    (result,) = latency_of(found).results
    resolved = Predictor(open_model("tiny", Silence()), device="cpu", precision="auto").precision
    assert (result.asked, result.precision) == ("auto", resolved)
    (table,) = found.tables()
    assert f"auto: {resolved}" in table.rows[0]


def test_the_document_is_plain_json_with_all_that_repeats_the_measurement(report: BenchReport) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["format"] == 2
    assert document["input"] == {"height": 64, "width": 96, "batch_size": 2, "precisions": ["fp32", "bf16"]}
    assert {"cpu", "threads", "device", "allocator"} <= set(document["machine"])
    assert document["versions"]["torch"] == torch.__version__
    assert set(document["kernels"]) == {"cpu", "cuda"}
    sizes, latency = document["measurements"]
    assert sizes["result"][0]["parameters"] == 6_437_084
    assert latency["kind"] == LATENCY
    assert len(latency["result"][0]["seconds"]["samples"]) == 3


def test_a_checkpoint_is_measured_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "three.safetensors"
    config = get_preset("tiny", classes=3, queries=7)
    save_checkpoint(path, build_detector(config), ClassTable((1, 2, 3), ("a", "b", "c")))
    found = run_bench(BenchOptions((str(path),), **QUICK))
    (result,) = latency_of(found).results
    assert result.weights == str(path)
    sizes = found.sections[0].to_json()
    assert sizes[0]["parameters"] == sum(p.numel() for p in build_detector(config).parameters())


def test_a_model_file_that_is_none_is_refused_as_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "page.pth"
    path.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"page\.pth"):
        run_bench(BenchOptions((str(path),), **QUICK))


def test_presets_are_measured_without_looking_for_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("looked for weights")

    monkeypatch.setattr("ddetr_cli.bench.subjects.load_model", refuse)
    run_bench(BenchOptions(("tiny",), **QUICK))


def test_random_models_are_always_the_same() -> None:
    first, second = (open_model("tiny", Silence()).model.state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_sampling_points_of_random_models_move_by_about_two_pixels_from_query_to_query() -> None:
    model = open_model("r50", Silence()).model
    layer = next(module for module in model.modules() if isinstance(module, DeformableAttention))
    # A query as the encoder's first layer sees it: a normed embedding, a position, a level embedding.
    generator = torch.Generator().manual_seed(1)
    angle = torch.rand(500, 128, generator=generator) * 6.28
    position = torch.cat((angle.sin(), angle.cos()), dim=1)
    query = torch.randn(500, 256, generator=generator) + position + torch.randn(256, generator=generator)
    with torch.no_grad():
        moved = layer.sampling_offsets(query) - layer.sampling_offsets.bias
    assert float(moved.std()) == pytest.approx(OFFSET_PIXELS, rel=0.1)


def test_running_out_of_memory_is_reported_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("ddetr_cli.bench.run.measure_latency", exhausted)
    with pytest.raises(DeviceError, match=r"out of memory .*--batch-size"):
        run_bench(BenchOptions(("tiny",), **QUICK))
