"""The CUDA kernels without a GPU: on an emulated one under sanitizers, and what the compiler made of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

FLAGS = ["-std=gnu++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing"]
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def build_driver(builder: Any, repository: Path, folder: Path, **other: Path) -> Path:
    """The driver and all kernels; ``other``, by their names, are files from elsewhere."""
    source, emulated = repository / "csrc", repository / "tests/native/emulated_cuda"
    cuda = {file.stem: file for file in sorted(source.glob("*.cu"))}
    assert set(other) <= set(cuda)
    files = [source / "status.cpp", emulated / "controls.cpp", repository / "tests/native/cuda_driver.cpp"]
    # Theirs first: of a function that several files have from a header, the linker takes the first.
    units = [(file, ("-x", "c++")) for file in [*({**other, **cuda, **other}).values(), *files]]
    flags = [*FLAGS, *SANITIZE, f"-I{emulated}", f"-I{source / 'include'}", f"-I{source}"]
    return builder.build(units, flags, folder / "driver", compiler="g++")  # type: ignore[no-any-return]


def test_no_thread_touches_a_byte_that_is_not_its_callers(builder: Any, repository: Path, tmp_path: Path) -> None:
    driver = build_driver(builder, repository, tmp_path)
    result = subprocess.run([str(driver)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "0 failures\n"


@pytest.mark.parametrize(
    ("file", "right", "wrong", "kernels", "complaint"),
    [
        ("msda_cuda_backward.cu", "cell.line + 1 < height", "cell.line < height", "backward", "heap-buffer-overflow"),
        ("msda_cuda.cuh", "* 3 * dims.heads", "* 4 * dims.heads", "plain", "heap-buffer-overflow"),
        ("msda_cuda.cuh", "return logits_of(dims, b, q, m)[i] = weight * by_weight", "return 0", "plain", "FAILED"),
        ("msda_cuda_forward.cu", "__syncwarp();  // everyone has read the batch before", "", "forward", "FAILED"),
    ],
    ids=["a neighbour outside the map", "gradients too far apart", "no sum of the softmax", "a barrier too few"],
)
def test_a_mistake_in_a_kernel_would_be_found(
    builder: Any,
    repository: Path,
    tmp_path: Path,
    file: str,
    right: str,
    wrong: str,
    kernels: str,
    complaint: str,
) -> None:
    """Even where only some of the kernels have it."""
    shutil.copytree(repository / "csrc", tmp_path / "csrc")
    text = (tmp_path / "csrc" / file).read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "csrc" / file).write_text(text.replace(right, wrong), encoding="utf-8")
    name = f"msda_cuda_{kernels}"
    driver = build_driver(builder, repository, tmp_path, **{name: tmp_path / "csrc" / f"{name}.cu"})
    result = subprocess.run([str(driver), "--first"], capture_output=True, text=True, timeout=600)
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
