"""Which implementation is chosen, and how it is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import kernel_status, kernels, native, native_cuda

CPU = torch.device("cpu")


@pytest.mark.usefixtures("require_native")
def test_the_native_kernels_are_chosen_where_they_are_installed() -> None:
    assert isinstance(kernels.kernels_for(torch.device("cpu")), native.CpuKernels)
    status = str(kernel_status())
    assert status.startswith("kernels: cpu native (")
    assert "self-test passed" in status


@pytest.mark.usefixtures("fresh_kernels")
def test_the_status_says_that_the_reference_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_NATIVE_DIR", str(tmp_path))
    monkeypatch.delenv("DDETR_REQUIRE_NATIVE", raising=False)
    assert kernel_status().cpu == "reference (no native library installed)"


@pytest.mark.usefixtures("fresh_kernels")
def test_the_status_says_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_NATIVE_DIR", str(tmp_path))
    (tmp_path / "libddetr_cpu.so").write_text("no library")
    assert kernel_status().cpu.startswith("broken (")


@pytest.mark.usefixtures("fresh_kernels")
def test_the_self_test_runs_once_and_its_verdict_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def fail(*_: object) -> None:
        runs.append(1)
        raise KernelError("libddetr_cpu.so: computes a wrong output.")

    monkeypatch.setattr(native, "cpu_kernels", object)
    monkeypatch.setattr("ddetr_cli.ops.selftest.check_kernels", fail)
    for _ in range(3):
        with pytest.raises(KernelError, match="wrong output"):
            kernels.kernels_for(torch.device("cpu"))
    assert len(runs) == 1


@pytest.mark.usefixtures("fresh_kernels")
def test_a_broken_cuda_library_leaves_the_cpu_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KernelError("libddetr_cuda.so: cannot be loaded.")

    monkeypatch.delenv("DDETR_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(native_cuda, "cuda_kernels", broken)
    with pytest.raises(KernelError, match=r"libddetr_cuda\.so"):
        kernels.kernels_for(torch.device("cuda", 0))
    kernels.kernels_for(torch.device("cpu"))


@pytest.mark.slow
class TestFastCudaKernels:
    """Chosen by DDETR_CUDA_KERNELS=fast, if they pass their self-test; on an emulated GPU."""

    @pytest.fixture(autouse=True)
    def _ask_for_them(
        self, emulated: native_cuda.CudaKernels, fresh_kernels: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DDETR_CUDA_KERNELS", "fast")
        monkeypatch.setattr(native, "cpu_kernels", lambda: emulated)
        monkeypatch.setattr(kernels.native_cuda, "cuda_kernels", lambda: emulated)

    def test_right_ones_are_taken_and_reported_as_not_yet_proved(self) -> None:
        chosen = kernels.kernels_for(CPU)
        assert isinstance(chosen, native_cuda.CudaKernels)
        assert chosen.kernels == "fast"
        assert kernel_status().cpu == "native (fast kernels, not yet proved on a GPU, self-test passed)"

    @pytest.mark.parametrize("form", ["fast rows", "fast warps"])
    def test_wrong_ones_are_replaced_by_the_plain_ones_with_the_reason(
        self, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = native_cuda.CudaKernels.forward

        def forward(self: native_cuda.CudaKernels, *arguments: Any) -> torch.Tensor:
            return right(self, *arguments) * (1.1 if self.kernels == form else 1)

        monkeypatch.setattr(native_cuda.CudaKernels, "forward", forward)
        with pytest.warns(RuntimeWarning, match="plain CUDA kernels run instead of the fast ones: .* wrong output"):
            chosen = kernels.kernels_for(CPU)
        assert isinstance(chosen, native_cuda.CudaKernels)
        assert chosen.kernels == "plain"

    def test_wrong_plain_ones_are_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native_cuda.CudaKernels, "forward", lambda self, value, *others: value.flatten(2)[:, :11])
        with pytest.raises(KernelError, match="wrong output"):
            kernels.kernels_for(CPU)


def test_without_a_gpu_the_status_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel_status().cuda == "none (PyTorch sees no CUDA device)"


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False), ("off", False)]
)
def test_the_variable_is_read_as_people_write_it(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_REQUIRE_NATIVE", value)
    assert kernels.is_native_required() is expected
