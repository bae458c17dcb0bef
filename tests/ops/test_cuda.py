"""The CUDA kernels on a real GPU: what an emulated one cannot show. The rest is in the tables of the other files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddetr_cli.bench.op_cases import OpInput, make_input
from ddetr_cli.errors import KernelError
from ddetr_cli.ops import kernels, msda, msda_fused, native_cuda, reference
from ddetr_cli.ops.native_cuda import CudaKernels

pytestmark = pytest.mark.usefixtures("require_cuda")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=list(native_cuda.KERNELS))
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CudaKernels:
    """Every kind of CUDA kernels, as those that the op runs on the first device."""
    installed = native_cuda.cuda_kernels()
    assert installed is not None
    chosen = replace(installed, kernels=request.param)
    monkeypatch.setitem(kernels._BY_DEVICE, torch.device("cuda", 0), chosen)
    return chosen


def problem(
    shape: str = "encoder", size: tuple[int, int] = (160, 224), dtype: torch.dtype = torch.float32
) -> OpInput:
    found = make_input(shape, "local", size, 2, torch.device("cuda", 0))
    return replace(found, value=found.value.to(dtype), grad_output=found.grad_output.to(dtype))


def run(cuda: CudaKernels, given: OpInput, *, deterministic: bool = True) -> list[Tensor]:
    """The output, that of the fused form, and the three gradients."""
    inputs = (given.value, given.level_hw, given.sampling_xy, given.weights)
    fused = torch.empty_like(given.grad_output)
    cuda.fused(given.value, given.level_hw, given.reference_xy, given.projected, fused)
    return [
        cuda.forward(*inputs),
        fused,
        *cuda.backward(given.grad_output, *inputs, deterministic=deterministic),
    ]


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_full_size_everything_equals_float64(cuda: CudaKernels, shape: str, dtype: torch.dtype) -> None:
    given = problem(shape, (800, 1333), dtype)
    wide = [t.double() for t in (given.value, given.sampling_xy, given.weights)]
    value, xy, weights = wide
    expected = [
        reference.msda_forward(value, given.level_hw, xy, weights),
        reference.msda_fused(value, given.level_hw, given.reference_xy.double(), given.projected.double()),
        *reference.msda_backward(given.grad_output.double(), value, given.level_hw, xy, weights),
    ]
    # the guards of one rounding of the result; sums of thousands of products in the gradient of the value
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for deterministic in (False, True):
        for index, (found, wanted) in enumerate(
            zip(run(cuda, given, deterministic=deterministic), expected, strict=True)
        ):
            error = (found.double() - wanted).norm() / wanted.norm()
            # a location within a rounding of a pixel's edge may count to the other side, where its gradient jumps
            assert error <= (1e-2 if index == 3 else tolerance), index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_deterministic_runs_give_the_same_bits(cuda: CudaKernels, dtype: torch.dtype) -> None:
    given = problem("encoder", (400, 600), dtype)
    first = run(cuda, given)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run(cuda, given), first, strict=True))


def test_deterministic_algorithms_of_pytorch_choose_the_deterministic_gradient(cuda: CudaKernels) -> None:
    given = problem()
    inputs = (given.value, given.level_hw, given.sampling_xy, given.weights)
    expected = cuda.backward(given.grad_output, *inputs, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        found = torch.ops.ddetr.msda_backward(given.grad_output, *inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_graph_replays_with_other_numbers(cuda: CudaKernels, shape: str, deterministic: bool) -> None:
    given = problem(shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(cuda, given, deterministic=deterministic)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(cuda, given, deterministic=deterministic)
    for _ in range(3):
        given.value.normal_()
        given.logits.normal_()
        given.grad_output.normal_()
        graph.replay()
        replayed = [result.clone() for result in results]
        for found, wanted in zip(replayed, run(cuda, given, deterministic=deterministic), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_work_waits_for_what_was_queued_on_its_own_stream(cuda: CudaKernels) -> None:
    given = problem("encoder", (800, 1066))
    expected = run(cuda, given)
    value = given.value.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    given.value.fill_(torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        given.value.copy_(value)  # behind the sleep: who runs on another stream reads NaN
        results = run(cuda, given)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_second_device_is_computed_on_while_the_first_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    given = problem()
    expected = msda(given.value, given.level_hw, given.sampling_xy, given.weights)
    second = [t.to("cuda:1") for t in (given.value, given.sampling_xy, given.weights)]
    assert torch.cuda.current_device() == 0
    output = msda(second[0], given.level_hw, second[1], second[2])
    assert output.device.index == 1
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(output.cpu(), expected.cpu(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_under_autocast_and_compiled_gives_what_it_gives_without(
    cuda: CudaKernels, dtype: torch.dtype
) -> None:
    given = problem("decoder")

    def layer(value: Tensor, projected: Tensor) -> Tensor:
        return msda_fused(value.to(dtype), given.level_hw, given.reference_xy, projected)

    expected = layer(given.value, given.projected)
    with torch.autocast("cuda", dtype=dtype):
        assert torch.equal(layer(given.value, given.projected), expected)
    torch._dynamo.reset()
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(layer, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(given.value, given.projected), expected, rtol=1e-2, atol=1e-2)


def test_a_launch_that_fails_is_raised(cuda: CudaKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda, "device_and_stream", lambda tensor: (99, 0))
    given = problem()
    with pytest.raises(KernelError, match="invalid device ordinal"):
        cuda.forward(given.value, given.level_hw, given.sampling_xy, given.weights)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(repository: Path, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on this machine")
    # one child process, with PyTorch's caching off so that every buffer has ends of its own
    test = f"{Path(__file__)}::test_the_smallest_problems_run"
    result = subprocess.run(
        [sanitizer, f"--tool={tool}", "--error-exitcode=7", sys.executable, "-m", "pytest", "-q", "-x", test],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_the_smallest_problems_run(cuda: CudaKernels) -> None:
    for dtype in DTYPES:
        for shape in ("encoder", "decoder"):
            for deterministic in (False, True):
                results = run(cuda, problem(shape, (40, 56), dtype), deterministic=deterministic)
                assert all(result.isfinite().all() for result in results)
