"""A part of the suite as it runs elsewhere: without AMX or AVX-512, on portable code alone, without native code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddetr_cli.ops import native

pytestmark = pytest.mark.slow

# From pictures to detections, also by the demo model, whose scores are known; and steps of training.
PART = ("tests/test_demo.py", "tests/inference", "tests/train/test_loop.py")
STATUS = "from ddetr_cli.ops import kernel_status; print(kernel_status().cpu)"


def outcome(repository: Path, environment: dict[str, str], *arguments: str) -> str:
    """What Python says in ``environment``, which replaces whatever chooses kernels here."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("DDETR_CPU_ISA", "DDETR_REQUIRE_NATIVE")}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_part(repository: Path, environment: dict[str, str], folder: Path) -> None:
    # A folder of its own: in the common one a second pytest takes from others what tests of permissions gave them.
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", f"--basetemp={folder}"]
    outcome(repository, environment, "-m", "pytest", *options, *PART)


@pytest.mark.usefixtures("require_native")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_it_passes_on_a_processor_that_has_no_more_than(isa: str, repository: Path, tmp_path: Path) -> None:
    installed = native.cpu_kernels()
    assert installed is not None
    if installed.library.ddetr_cpu_isa(native._ISAS[isa]) < 0:
        pytest.skip(f"this processor or this build has no {isa}")
    environment = {"DDETR_CPU_ISA": isa, "DDETR_REQUIRE_NATIVE": "1"}
    assert outcome(repository, environment, "-c", STATUS).startswith(f"native ({isa}")
    run_part(repository, environment, tmp_path / "part")


def test_it_passes_without_a_native_library(repository: Path, tmp_path: Path) -> None:
    environment = {"DDETR_NATIVE_DIR": str(tmp_path)}
    assert outcome(repository, environment, "-W", "ignore", "-c", STATUS).startswith("reference")
    run_part(repository, environment, tmp_path / "part")
