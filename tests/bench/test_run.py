"""A whole measurement of the small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddetr_cli.bench.options import BenchOptions
from ddetr_cli.bench.run import BenchReport, run_bench
from ddetr_cli.classes import ClassTable
from ddetr_cli.errors import CheckpointError
from ddetr_cli.model.detector import DeformableDetr, build_detector
from ddetr_cli.presets import ModelConfig, get_preset
from ddetr_cli.weights import save_checkpoint


@pytest.fixture(scope="module")
def report() -> BenchReport:
    runs: list[None] = []
    report = run_bench(
        BenchOptions(("tiny",), size_hw=(64, 96), batch_size=2, device="cpu", rounds=3, warmup=1),
        on_run=lambda: runs.append(None),
    )
    assert len(runs) == 4  # one warm-up, three rounds
    return report


def test_every_round_is_kept(report: BenchReport) -> None:
    latency = report.models[0].latency
    assert len(latency.seconds) == 3
    assert 0 < latency.fastest <= latency.median <= latency.p90


def test_images_per_second_count_the_whole_batch(report: BenchReport) -> None:
    model = report.models[0]
    assert model.images_per_second(2) == pytest.approx(2 / model.latency.median)


def test_the_json_holds_all_that_is_needed_to_repeat_the_measurement(report: BenchReport) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["input"] == {"height": 64, "width": 96, "batch_size": 2, "precision": "fp32"}
    assert (document["rounds"], document["warmup"]) == (3, 1)
    assert set(document["conventions"]) == {"flops", "latency"}
    assert set(document["kernels"]) == {"cpu", "cuda"}
    assert document["machine"]["cpu"]
    assert document["versions"]["torch"] == torch.__version__
    model = document["models"][0]
    assert (model["name"], model["preset"], model["weights"]) == ("tiny", "tiny", "random")
    assert model["parameters"] == sum(p.numel() for p in build_detector(get_preset("tiny")).parameters())
    assert model["flops"] == sum(model["flops_by_operation"].values())
    assert set(model["latency_s"]) == {"median", "p90", "min", "samples"}


def test_flops_are_those_of_one_picture_whatever_the_batch(report: BenchReport) -> None:
    alone = run_bench(BenchOptions(("tiny",), size_hw=(64, 96), device="cpu", rounds=1, warmup=1))
    assert alone.models[0].size == report.models[0].size


def test_a_checkpoint_is_measured_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "three.safetensors"
    config = get_preset("tiny", classes=3, queries=7)
    save_checkpoint(path, build_detector(config), ClassTable((1, 2, 3), ("a", "b", "c")))
    found = run_bench(BenchOptions((str(path),), size_hw=(64, 64), device="cpu", rounds=1, warmup=1)).models[0]
    assert found.weights == str(path)
    assert found.size.parameters == sum(p.numel() for p in build_detector(config).parameters())


def test_a_model_file_that_is_none_is_refused_as_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "page.pth"
    path.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"page\.pth"):
        run_bench(BenchOptions((str(path),), size_hw=(64, 64), device="cpu", rounds=1, warmup=1))


def test_presets_are_measured_without_looking_for_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("looked for weights")

    monkeypatch.setattr("ddetr_cli.bench.run.load_model", refuse)
    run_bench(BenchOptions(("tiny",), size_hw=(64, 64), device="cpu", rounds=1, warmup=1))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_model_runs_in_the_precision_asked_for(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()

    def watched(config: ModelConfig) -> DeformableDetr:
        model = build_detector(config)
        # the count of FLOPs runs it too, outside inference mode
        model.register_forward_hook(
            lambda _, __, out: seen.add(out.logits.dtype) if torch.is_inference_mode_enabled() else None
        )
        return model

    monkeypatch.setattr("ddetr_cli.bench.run.build_detector", watched)
    run_bench(BenchOptions(("tiny",), size_hw=(64, 64), precision=precision, device="cpu", rounds=1, warmup=1))
    assert seen == {dtype}
