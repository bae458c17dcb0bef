"""Ours beside other programs: the same weights, the same answers, and what is missing is said."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddetr_cli.bench import peers, rivals
from ddetr_cli.bench.options import BenchOptions
from ddetr_cli.bench.peers import (
    ONNX_RUNTIME,
    OPENVINO,
    REQUIREMENTS,
    TRANSFORMERS,
    build_pair,
    build_peers,
    missing_packages,
)
from ddetr_cli.bench.rivals import RivalResult, RivalsSection, measure_rivals
from ddetr_cli.bench.tables import Silence
from ddetr_cli.bench.timing import Samples
from ddetr_cli.errors import UsageError
from ddetr_cli.presets import PRESETS

OPTIONS = BenchOptions(
    ("r50-single-scale",), size_hw=(64, 96), precisions=("fp32",), device="cpu", rounds=2, warmup=1
)

needs_transformers = pytest.mark.skipif(
    bool(missing_packages(TRANSFORMERS)), reason="transformers and timm are not installed"
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets of one layer each, so that a pair is built in a moment."""
    for name in ("r50-single-scale", "detr-r50"):
        shallow = dataclasses.replace(PRESETS[name], encoder_layers=1, decoder_layers=1)
        monkeypatch.setitem(PRESETS, name, shallow)


@needs_transformers
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("preset", ["r50-single-scale", "detr-r50"])
def test_transformers_gives_our_answer_with_the_same_weights(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "REQUIREMENTS", {TRANSFORMERS: REQUIREMENTS[TRANSFORMERS]})
    (section,) = measure_rivals(dataclasses.replace(OPTIONS, models=(preset,)), Silence())
    ours, theirs = section.results
    assert (ours.program, ours.is_ours, theirs.program, theirs.is_ours) == ("ddetr fp32", True, TRANSFORMERS, False)
    assert section.reference == TRANSFORMERS
    assert theirs.logits_error == 0.0
    assert ours.logits_error < 1e-4  # two programs round differently
    assert ours.boxes_error < 1e-5
    assert section.largest_logit > 0.1  # agreement about nothing would mean little


@needs_transformers
def test_answers_of_random_weights_differ_from_query_to_query(tmp_path: Path) -> None:
    theirs, _ = build_pair("r50-single-scale", tmp_path)
    with torch.inference_mode():
        logits = theirs(pixel_values=torch.randn(1, 3, 64, 96)).logits
    assert float(logits.std(dim=1).min()) > 1e-3


@pytest.mark.parametrize("model", ["tiny", "demo", "fasterrcnn-r50-fpn", "some/file.pth"])
def test_what_has_no_counterpart_is_refused_with_what_has(model: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no counterpart in transformers.*r50.*detr-r50"):
        build_pair(model, tmp_path)


def test_rivals_are_compared_on_the_cpu_only() -> None:
    with pytest.raises(UsageError, match="--device cpu"):
        measure_rivals(dataclasses.replace(OPTIONS, device="cuda"), Silence())


def test_without_any_rival_ours_is_measured_and_the_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (section,) = measure_rivals(dataclasses.replace(OPTIONS, models=("tiny",)), Silence())
    assert [result.program for result in section.results] == ["ddetr fp32"]
    assert set(section.absent) == set(REQUIREMENTS)
    notes = " ".join(section.tables()[0].notes)
    assert "OpenVINO f32 (not installed: transformers, timm, onnx, onnxscript, openvino)" in notes


def test_a_peer_that_fails_is_named_with_the_reason_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("NOT_IMPLEMENTED: GridSample(16)")

    class Theirs(torch.nn.Module):
        def forward(self, pixel_values: Tensor) -> object:
            return type("Output", (), {"logits": pixel_values, "pred_boxes": pixel_values})

    monkeypatch.setattr(peers, "_export", lambda *_: tmp_path / "model.onnx")
    monkeypatch.setattr(peers, "_onnx_runtime", broken)
    monkeypatch.setattr(peers, "_openvino", lambda *_: lambda: (torch.zeros(1), torch.zeros(1)))
    names = [TRANSFORMERS, ONNX_RUNTIME, OPENVINO]
    ready, failures = build_peers(Theirs(), torch.zeros(1, 3, 8, 8), tmp_path, names, Silence())
    assert [peer.name for peer in ready] == [TRANSFORMERS, OPENVINO]
    assert failures == {ONNX_RUNTIME: "RuntimeError: NOT_IMPLEMENTED: GridSample(16)"}


def test_ratios_are_made_within_rounds_for_each_of_our_precisions() -> None:
    section = RivalsSection(
        "r50",
        TRANSFORMERS,
        1.0,
        (
            RivalResult("ddetr fp32", True, Samples((1.0, 2.0)), 1e-6, 1e-7),
            RivalResult("ddetr bf16", True, Samples((0.5, 1.0)), 1e-2, 1e-4),
            RivalResult(TRANSFORMERS, False, Samples((3.0, 6.0)), 0.0, 0.0),
        ),
        {},
        {},
    )
    ratios = section.to_json()["programs"][2]["ratios"]
    assert ratios["ddetr fp32"]["samples"] == [3.0, 3.0]
    assert ratios["ddetr bf16"]["samples"] == [6.0, 6.0]
    assert "3.00x (3.00-3.00)" in section.tables()[0].rows[2]


@needs_transformers
@pytest.mark.usefixtures("small")
@pytest.mark.slow
def test_the_exported_model_gives_our_answer_in_every_runtime_that_is_installed() -> None:
    (section,) = measure_rivals(OPTIONS, Silence())
    measured = [result for result in section.results if not result.is_ours]
    assert len(measured) + len(section.absent) == len(REQUIREMENTS)
    assert all("not installed" in why for why in section.absent.values())
    for result in measured:
        limit = 0.05 * section.largest_logit if "bf16" in result.program else 1e-4
        assert result.logits_error <= limit, result.program
