"""Which implementation is chosen, and how it is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import kernel_status, kernels, native


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
    monkeypatch.setattr(native, "cuda_kernels", broken)
    with pytest.raises(KernelError, match=r"libddetr_cuda\.so"):
        kernels.kernels_for(torch.device("cuda", 0))
    kernels.kernels_for(torch.device("cpu"))


def test_without_a_gpu_the_status_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel_status().cuda == "none (PyTorch sees no CUDA device)"


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False), ("off", False)]
)
def test_the_variable_is_read_as_people_write_it(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_REQUIRE_NATIVE", value)
    assert kernels.is_native_required() is expected
