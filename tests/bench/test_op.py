"""The op on its own: inputs, who computes them, and that all agree."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from ddetr_cli.bench.op import FORWARD, OpSection, measure_op
from ddetr_cli.bench.op_cases import SHAPES, backends, baseline, level_sizes, make_input
from ddetr_cli.bench.options import BenchOptions
from ddetr_cli.bench.tables import Silence
from ddetr_cli.ops import native, reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def section() -> OpSection:
    options = BenchOptions(("r50",), size_hw=(40, 48), device="cpu", rounds=2, warmup=1)
    return measure_op(options, CPU, Silence())


def test_the_maps_of_800x1333_are_those_of_the_paper() -> None:
    level_hw = level_sizes((800, 1333), 4)
    assert level_hw == [100, 167, 50, 84, 25, 42, 13, 21]
    assert sum(h * w for h, w in zip(level_hw[::2], level_hw[1::2], strict=True)) == 22_223


@pytest.mark.parametrize("shape", SHAPES)
def test_local_points_spread_by_two_pixels_around_the_star_of_a_fresh_model(shape: str) -> None:
    problem = make_input(shape, "local", (160, 160), 1, CPU)
    wh = torch.tensor(problem.level_hw).view(4, 2).flip(-1)
    offsets = (problem.sampling_xy - problem.reference_xy[:, :, None, :, None]) * wh[:, None]
    # Head 0 looks along x: its points are 1, 2, 3 and 4 pixels to the right.
    torch.testing.assert_close(
        offsets[:, :, 0].mean((0, 1, 2)), torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]), rtol=0, atol=0.3
    )
    assert float(offsets[:, :, 0, :, 0, 0].std()) == pytest.approx(2.0, rel=0.1)


def test_uniform_points_lie_anywhere_in_the_picture() -> None:
    xy = make_input("encoder", "uniform", (160, 160), 1, CPU).sampling_xy
    assert -1e-5 <= float(xy.min()) < 0.01 and 0.99 < float(xy.max()) <= 1 + 1e-5
    assert float(xy.mean()) == pytest.approx(0.5, abs=0.01)


def test_what_the_fused_op_takes_means_the_same_points_and_weights() -> None:
    problem = make_input("decoder", "local", (64, 96), 2, CPU)
    count = problem.logits[0, 0].numel()
    offsets = problem.projected[..., : 2 * count].view_as(problem.sampling_xy)
    wh = torch.tensor(problem.level_hw).view(4, 2).flip(-1)
    moved = problem.reference_xy[:, :, None, :, None] + offsets / wh[:, None]
    torch.testing.assert_close(moved, problem.sampling_xy)
    assert torch.equal(problem.projected[..., 2 * count :], problem.logits.flatten(2))


def test_weights_sum_to_one() -> None:
    weights = make_input("decoder", "local", (64, 64), 1, CPU).weights
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(1, 300, 8))


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_the_baseline_is_transformers_and_computes_the_same() -> None:
    base = baseline()
    assert base.name == "transformers grid_sample"
    problem = make_input("decoder", "local", (64, 96), 2, CPU)
    arguments = (problem.value, problem.level_hw, problem.sampling_xy, problem.weights)
    torch.testing.assert_close(base.forward(*arguments), reference.msda_forward(*arguments))


def test_without_transformers_the_baseline_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddetr_cli.bench.op_cases.importlib.util.find_spec", lambda _: None)
    assert baseline().name == "ddetr reference"


@pytest.mark.usefixtures("require_native")
def test_every_slower_instruction_set_of_this_processor_is_forced() -> None:
    kernels = native.cpu_kernels()
    assert kernels is not None
    names = [backend.name for backend in backends(CPU)]
    assert names[0] == f"ddetr {kernels.isa}"
    assert "ddetr portable" in names
    assert ("ddetr avx2" in names) == (kernels.isa in ("avx2", "avx512"))


def test_without_native_kernels_the_reference_alone_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_kernels", lambda: None)
    assert [backend.name for backend in backends(CPU)] == ["ddetr reference"]


def test_everyone_gives_the_baselines_answer(section: OpSection) -> None:
    # 16-bit values carry 8 (bf16) or 11 (fp16) bits; a sum of 16 weighted samples does not lose more.
    limits = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
    assert all(result.error <= limits[result.dtype] for result in section.results)


def test_the_baseline_is_no_faster_than_itself(section: OpSection) -> None:
    base = [result for result in section.results if result.backend == section.baseline]
    assert len(base) == 8  # two directions, two shapes, two kinds of points
    assert {result.speedup.values for result in base} == {(1.0, 1.0)}


def test_there_is_a_table_for_every_case_and_every_sample_in_the_document(section: OpSection) -> None:
    assert len(section.tables()) == 8
    cases = section.to_json()["cases"]
    assert len(cases) == len(section.results)
    assert all(len(case["seconds"]["samples"]) == 2 for case in cases)


def test_16_bit_values_are_timed_where_native_kernels_take_them(section: OpSection) -> None:
    kernels = native.cpu_kernels()
    forward = {(r.backend, r.dtype) for r in section.results if r.direction == FORWARD}
    expected = {"fp32"} if kernels is None else {"fp32", "bf16", "fp16"}
    best = "ddetr reference" if kernels is None else f"ddetr {kernels.isa}"
    assert {dtype for backend, dtype in forward if backend == best} == expected
