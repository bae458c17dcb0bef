"""What ``ddetr --version`` says, from the files of the installation alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddetr_cli import versions
from ddetr_cli.versions import find_built_file, kernels_line, version_text


@pytest.fixture(autouse=True)
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the build is looked for, empty."""
    monkeypatch.setenv("DDETR_NATIVE_DIR", str(tmp_path))
    return tmp_path


def write_record(folder: Path, architectures: str, reason: str) -> None:
    record = {"cuda": {"architectures": architectures, "reason": reason}}
    (folder / "kernels.json").write_text(json.dumps(record), encoding="utf-8")


def test_without_libraries_the_reference_is_named() -> None:
    assert kernels_line() == ("kernels: cpu reference, cuda none (no compiler worked when ddetr was installed)")


def test_with_both_libraries_the_architectures_are_named(built: Path) -> None:
    (built / "libddetr_cpu.so").touch()
    (built / "libddetr_cuda.so").touch()
    write_record(built, "sm_90 PTX compute_90", "")
    assert kernels_line() == "kernels: cpu native, cuda sm_90 PTX compute_90 (plain kernels, not yet proved on a GPU)"


def test_the_cuda_kernels_that_are_asked_for_are_named_with_the_gpus_they_were_proved_on(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("libddetr_cpu.so", "libddetr_cuda.so"):
        (built / name).touch()
    write_record(built, "sm_90", "")
    monkeypatch.setenv("DDETR_CUDA_KERNELS", "fast")
    monkeypatch.setitem(versions.CUDA_PROVED_ON, "fast", ("NVIDIA H200", "NVIDIA T4"))
    assert kernels_line().endswith("cuda sm_90 (fast kernels, proved on NVIDIA H200, NVIDIA T4)")


def test_without_the_cuda_library_the_recorded_reason_is_given(built: Path) -> None:
    (built / "libddetr_cpu.so").touch()
    write_record(built, "", "nvcc not found")
    assert kernels_line() == "kernels: cpu native, cuda none (nvcc not found)"


@pytest.mark.parametrize("text", ["", "[]", '{"cuda": 1}', "\x00"])
def test_a_damaged_record_is_reported_not_raised(built: Path, text: str) -> None:
    (built / "libddetr_cpu.so").touch()
    (built / "kernels.json").write_text(text, encoding="utf-8")
    assert kernels_line().startswith("kernels: cpu native, cuda none (unreadable record ")


def test_the_text_ends_in_the_kernels_and_names_python_and_torch() -> None:
    first, second, last = version_text().splitlines()
    assert first.startswith("ddetr ")
    assert second.startswith(f"python {sys.version_info.major}.{sys.version_info.minor}.")
    assert ", torch 2." in second
    assert last == kernels_line()


def test_the_chosen_folder_is_the_only_one_looked_into(built: Path) -> None:
    assert find_built_file("libddetr_cpu.so") is None
    (built / "libddetr_cpu.so").touch()
    assert find_built_file("libddetr_cpu.so") == built / "libddetr_cpu.so"


def test_torch_is_not_imported() -> None:
    code = "import sys; from ddetr_cli.versions import version_text; version_text(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "False"
