"""What ``pip install`` leaves, with and without compilers. Each builds a wheel from a copy of the source tree.

pip fetches scikit-build-core into the isolated build environment, so a package index must be reachable.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
RELEASE_ARCHITECTURES = "75;80;86;89;90;100;120"
IN_WHEEL = "ddetr_cli/ops/"
# Compiles the kernels of the CPU in a fifth of the time, for tests of something else.
UNOPTIMISED = '#!/bin/sh\nexec "$@" -O0\n'


class Build:
    """One run of pip on a copy of the tree."""

    def __init__(self, repository: Path, folder: Path, *, is_optimised: bool = True, **environment: str) -> None:
        tree, wheels = folder / "tree", folder / "wheels"
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        for name in ("src", "csrc"):
            shutil.copytree(repository / name, tree / name, ignore=ignore)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(repository / name, tree)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("DDETR_") and k not in ("PYTHONPATH",)}
        if not is_optimised:
            launcher = folder / "unoptimised"
            launcher.write_text(UNOPTIMISED)
            launcher.chmod(0o755)
            environment["CMAKE_CXX_COMPILER_LAUNCHER"] = str(launcher)
        self.process = subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(wheels), str(tree)],
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            timeout=900,
        )
        self.output = self.process.stdout + self.process.stderr
        self.installed = folder / "installed"
        self.wheel = next(wheels.glob("*.whl"), None) if wheels.exists() else None
        if self.wheel is not None:
            zipfile.ZipFile(self.wheel).extractall(self.installed)

    @property
    def libraries(self) -> set[str]:
        return {path.name for path in (self.installed / IN_WHEEL).glob("*.so")}

    @property
    def cuda_record(self) -> dict[str, str]:
        record = json.loads((self.installed / IN_WHEEL / "kernels.json").read_text(encoding="utf-8"))
        cuda: dict[str, str] = record["cuda"]
        return cuda

    def run(self, code: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DDETR_")}
        environment["PYTHONPATH"] = str(self.installed)
        command = [sys.executable, "-W", "ignore", "-c", code]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()


VERSION = "from ddetr_cli.versions import version_text; print(version_text())"
STATUS = "from ddetr_cli.ops import kernel_status; print(kernel_status())"
ONE_POINT = (
    "import torch; from ddetr_cli.ops import msda; one = torch.ones(1, 4, 1, 1); "
    "print(msda(one, [2, 2], torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)).item())"
)


def test_with_a_broken_nvcc_the_cpu_library_stays_and_the_reason_is_recorded(
    repository: Path, tmp_path: Path
) -> None:
    build = Build(repository, tmp_path, CUDACXX="/bin/false")
    assert build.wheel is not None, build.output
    assert build.wheel.name.rpartition("-")[0].endswith("-py3-none")
    assert build.libraries == {"libddetr_cpu.so"}
    assert "/bin/false failed with 1" in build.cuda_record["reason"]
    assert build.run(VERSION).splitlines()[-1].startswith("kernels: cpu native, cuda none (/bin/false failed with 1")
    assert build.run(STATUS).startswith("kernels: cpu native (")
    # the libraries stand alone: no PyTorch, no OpenMP
    needed = subprocess.run(
        ["ldd", str(build.installed / IN_WHEEL / "libddetr_cpu.so")], capture_output=True, text=True
    )
    assert "torch" not in needed.stdout
    assert "gomp" not in needed.stdout


def test_without_a_compiler_the_installation_succeeds_with_the_reference(repository: Path, tmp_path: Path) -> None:
    build = Build(repository, tmp_path, **NO_COMPILER)
    assert build.wheel is not None, build.output
    assert build.wheel.name.endswith("-py3-none-any.whl")
    assert build.libraries == set()
    assert build.run(VERSION).splitlines()[-1] == (
        "kernels: cpu reference, cuda none (no compiler worked when ddetr was installed)"
    )
    assert build.run(STATUS).startswith("kernels: cpu reference (")
    assert build.run(ONE_POINT) == "1.0"
    for weights in (repository / "src").rglob("*.safetensors"):
        assert (build.installed / weights.relative_to(repository / "src")).exists()


def test_without_a_compiler_but_native_required_the_installation_fails_with_the_reason(
    repository: Path, tmp_path: Path
) -> None:
    build = Build(repository, tmp_path, **NO_COMPILER, DDETR_REQUIRE_NATIVE="1")
    assert build.process.returncode != 0
    assert "the native kernels could not be built, and DDETR_REQUIRE_NATIVE" in build.output
    assert "C++ compiler" in build.output


def test_with_a_broken_nvcc_but_cuda_required_the_installation_fails_with_the_reason(
    repository: Path, tmp_path: Path
) -> None:
    build = Build(repository, tmp_path, is_optimised=False, CUDACXX="/bin/false", DDETR_CUDA="require")
    assert build.process.returncode != 0
    assert "/bin/false failed with 1" in build.output


def test_nvcc_compiles_for_every_architecture_of_a_release(repository: Path, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    release = {"DDETR_CUDA": "require", "DDETR_CUDA_ARCHITECTURES": RELEASE_ARCHITECTURES}
    build = Build(repository, tmp_path, is_optimised=False, **release)
    assert build.wheel is not None, build.output
    assert build.libraries == {"libddetr_cpu.so", "libddetr_cuda.so"}
    expected = " ".join(f"sm_{number}" for number in RELEASE_ARCHITECTURES.split(";")) + " PTX compute_120"
    assert build.cuda_record == {"architectures": expected, "reason": ""}
    line = f"kernels: cpu native, cuda {expected} (plain kernels, not yet proved on a GPU)"
    assert build.run(VERSION).splitlines()[-1] == line
    # loads without a GPU and answers for itself
    functions = "print(native_cuda.cuda_kernels().library.ddetr_cuda_error_string(1).decode())"
    assert build.run(f"from ddetr_cli.ops import native_cuda; {functions}") == "invalid argument"
