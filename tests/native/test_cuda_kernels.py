"""The CUDA kernels without a GPU: on an emulated one under sanitizers, and what the compiler made of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FLAGS = ["-std=gnu++17", "-g", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-x", "c++"]
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def build_driver(repository: Path, folder: Path, source: Path) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    emulated = repository / "tests/native/emulated_cuda"
    command = [compiler, *FLAGS, *SANITIZE, f"-I{emulated}", f"-I{source / 'include'}", f"-I{source}"]
    files = [
        *sorted(source.glob("*.cu")),
        source / "status.cpp",
        emulated / "controls.cpp",
        repository / "tests/native/cuda_driver.cpp",
    ]
    jobs = [
        subprocess.Popen(
            [*command, "-c", str(file), "-o", str(folder / f"{file.stem}.o")], stderr=subprocess.PIPE, text=True
        )
        for file in files
    ]
    for job in jobs:
        _, errors = job.communicate()
        if "cannot find" in errors:
            pytest.skip(f"this compiler has no sanitizers: {errors[:200]}")
        assert job.returncode == 0, errors
    objects = [str(folder / f"{file.stem}.o") for file in files]
    linked = subprocess.run(
        [compiler, *SANITIZE, *objects, "-o", str(folder / "driver")], capture_output=True, text=True
    )
    if "cannot find" in linked.stderr:
        pytest.skip(f"this compiler has no sanitizers: {linked.stderr[:200]}")
    assert linked.returncode == 0, linked.stderr
    return folder / "driver"


def test_no_thread_touches_a_byte_that_is_not_its_callers(repository: Path, tmp_path: Path) -> None:
    driver = build_driver(repository, tmp_path, repository / "csrc")
    result = subprocess.run([str(driver)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "0 failures\n"


@pytest.mark.parametrize(
    ("file", "right", "wrong", "complaint"),
    [
        ("msda_cuda_backward.cu", "cell.line + 1 < height", "cell.line < height", "heap-buffer-overflow"),
        ("msda_cuda.cuh", "* 3 * dims.heads", "* 4 * dims.heads", "heap-buffer-overflow"),
        ("msda_cuda.cuh", "return logits_of(dims, b, q, m)[i] = weight * by_weight", "return 0", "FAILED"),
        ("msda_cuda_forward.cu", "__syncwarp();  // everyone has read the batch before", "", "FAILED"),
    ],
    ids=["a neighbour outside the map", "gradients too far apart", "no sum of the softmax", "a barrier too few"],
)
def test_a_mistake_in_a_kernel_would_be_found(
    repository: Path, tmp_path: Path, file: str, right: str, wrong: str, complaint: str
) -> None:
    shutil.copytree(repository / "csrc", tmp_path / "csrc")
    kernels = tmp_path / "csrc" / file
    text = kernels.read_text(encoding="utf-8")
    assert right in text
    kernels.write_text(text.replace(right, wrong), encoding="utf-8")
    driver = build_driver(repository, tmp_path, tmp_path / "csrc")
    result = subprocess.run([str(driver)], capture_output=True, text=True, timeout=600)
    assert result.returncode != 0
    assert complaint in result.stderr


# ---- machine code ----


def disassemble(repository: Path, folder: Path, name: str) -> dict[str, Counter[str]]:
    """How often each instruction stands in each kernel of a file, for an H100."""
    nvcc, cuobjdump = shutil.which("nvcc"), find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        pytest.skip("no nvcc on this machine" if nvcc is None else "no cuobjdump on this machine")
    source, made = repository / "csrc", folder / f"{name}.o"
    architecture = ["-gencode", "arch=compute_90,code=sm_90"]
    command = [nvcc, "-std=c++17", "-O3", *architecture, f"-I{source / 'include'}", "-c", str(source / f"{name}.cu")]
    subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
    text = subprocess.run([cuobjdump, "--dump-sass", str(made)], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, Counter[str]] = {}
    for part in text.split("Function : ")[1:]:
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9.x]*)", part)
        kernels[part.split()[0]] = Counter(found)
    return kernels


def find_cuobjdump() -> str | None:
    """On the path, or where Triton, which comes with PyTorch, keeps one."""
    import importlib.util

    spec = importlib.util.find_spec("triton")
    folders = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "backends/nvidia/bin"]
    return shutil.which("cuobjdump") or next((p for d in folders if (p := shutil.which("cuobjdump", path=d))), None)


def number_of(instructions: Counter[str], prefix: str) -> int:
    return sum(count for name, count in instructions.items() if name.startswith(prefix))


def test_the_fast_forward_reads_16_bytes_at_a_time_and_keeps_everything_in_registers(
    repository: Path, tmp_path: Path
) -> None:
    kernels = disassemble(repository, tmp_path, "msda_cuda_forward")
    assert len(kernels) == 36  # 3 types, 3 numbers of channels, rows and warps, plain and fused
    for name, instructions in kernels.items():
        # every sample of a batch, all four neighbours
        assert number_of(instructions, "LDG.E.128") >= 4 * 2, name
        assert number_of(instructions, "STG.E.128") >= 1, name
        assert number_of(instructions, "LDL") == number_of(instructions, "STL") == 0, name


def test_the_fast_backward_adds_four_numbers_at_a_time_and_keeps_everything_in_registers(
    repository: Path, tmp_path: Path
) -> None:
    kernels = disassemble(repository, tmp_path, "msda_cuda_backward")
    assert len(kernels) == 27  # 3 types, 3 numbers of channels; fused, with the gradient of the value and without
    adding = {name: found for name, found in kernels.items() if number_of(found, "RED") > 0}
    assert len(adding) == 18
    for instructions in adding.values():
        assert number_of(instructions, "RED") == number_of(instructions, "REDG.E.ADD.F32x4")
    for instructions in kernels.values():
        assert number_of(instructions, "ATOM") == 0
        assert number_of(instructions, "LDL") == number_of(instructions, "STL") == 0


def test_the_deterministic_backward_has_no_atomics_on_numbers(repository: Path, tmp_path: Path) -> None:
    kernels = disassemble(repository, tmp_path, "msda_cuda_sorted")
    for instructions in kernels.values():
        assert number_of(instructions, "RED") == 0
        assert not any("F32" in name or "F64" in name for name in instructions if name.startswith("ATOM"))
