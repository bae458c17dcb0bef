"""The measurement of the op on a GPU, with tiny shapes and without one: what is checked, timed and reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddetr_cli.bench import gpu_op
from ddetr_cli.bench.gpu_ceilings import GATHER, measure_ceilings
from ddetr_cli.bench.gpu_kernels import Candidate, backward_candidates, forward_candidates
from ddetr_cli.bench.gpu_op import GpuOpSection, measure_gpu_op
from ddetr_cli.bench.op_cases import OpInput, make_input
from ddetr_cli.bench.options import BenchOptions
from ddetr_cli.bench.tables import Silence
from ddetr_cli.ops import reference

CPU = torch.device("cpu")
OPTIONS = BenchOptions(("r50",), size_hw=(40, 48), device="cpu", rounds=2, warmup=1)


@pytest.fixture(scope="module")
def section() -> GpuOpSection:
    return measure_gpu_op(OPTIONS, CPU, Silence())


def test_every_case_has_a_table_behind_that_of_the_ceilings(section: GpuOpSection) -> None:
    titles = [table.title for table in section.tables()]
    assert titles[0] == "ceilings of this device"
    assert len(titles) == 9  # two directions, two shapes, two kinds of points
    assert titles[1] == "op forward on the device, encoder of 40x48, local points, batch 1"


def test_all_that_is_timed_was_right_first(section: GpuOpSection) -> None:
    assert len({r.name for r in section.results}) == 3
    for result in section.results:
        assert result.times is not None
        assert result.error is not None
        assert result.error <= gpu_op.LARGEST_ERROR[result.dtype]


def test_plain_in_fp32_is_what_others_are_compared_with(section: GpuOpSection) -> None:
    plain = [r.speedup for r in section.results if (r.name, r.dtype) == ("plain", "fp32")]
    assert len(plain) == 8
    assert {speedup.values for speedup in plain if speedup is not None} == {(1.0, 1.0)}


def test_the_document_holds_every_sample_and_the_ceilings(section: GpuOpSection) -> None:
    document = section.to_json()
    assert document["ceilings"][GATHER]["rate"] > 0
    assert all(len(case["seconds"]["samples"]) == 2 for case in document["cases"])


def measure(second: Candidate, listener: Silence | None = None) -> list[gpu_op.GpuResult]:
    """The plain kernels and another candidate in one case."""
    problem = make_input("decoder", "local", OPTIONS.size_hw, 1, CPU)
    case = gpu_op._Case("backward", "decoder", "local", problem, 1e9, CPU)
    candidates = [backward_candidates(None)[0], second]
    return case.measure(candidates, ("fp32",), 1, Silence() if listener is None else listener)


def test_a_wrong_kernel_is_reported_and_never_timed() -> None:
    def prepare(p: OpInput) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            found = reference.msda_backward(p.grad_output, p.value, p.level_hw, p.sampling_xy, p.weights)
            return (found[0] * 1.01, *found[1:])

        return call

    plain, wrong = measure(Candidate("wrong one", ("fp32",), prepare))
    assert plain.times is not None
    assert wrong.times is None
    assert wrong.error == pytest.approx(0.01, rel=1e-3)
    assert wrong.reason == "wrong"


def test_a_kernel_that_fails_is_reported_with_its_own_words() -> None:
    class Ear(Silence):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def notice(self, text: str) -> None:
            self.heard.append(text)

    def prepare(p: OpInput) -> Callable[[], tuple[Tensor, ...]]:
        raise RuntimeError("only 7 heads are supported\nand more")

    ear = Ear()
    assert measure(Candidate("other", ("fp32",), prepare), ear)[1].reason == "failed"
    assert ear.heard == ["other fp32: only 7 heads are supported"]


def test_the_least_time_is_that_of_the_bytes_of_800x1333_at_the_rate_of_a_copy() -> None:
    problem = make_input("encoder", "local", (800, 1333), 1, CPU)
    case = gpu_op._Case("forward", "encoder", "local", problem, 4.3e12, CPU)
    assert case._bytes(problem) / 4.3e12 == pytest.approx(18.7e-6, rel=0.02)  # published limits of the op in fp32


def test_the_softmax_before_the_plain_kernels_gives_what_they_give() -> None:
    problem = make_input("decoder", "local", (40, 48), 1, CPU)
    plain, chain, *_ = forward_candidates(CPU, None)
    torch.testing.assert_close(chain.prepare(problem)()[0], plain.prepare(problem)()[0], rtol=1e-4, atol=1e-4)


def test_ceilings_are_rates_of_all_five_probes() -> None:
    table = measure_ceilings(CPU, 1).table()
    assert [row[0] for row in table.rows] == [
        "copy",
        "matrix product bf16",
        "cached read",
        "gather of rows",
        "adding of rows",
    ]
