"""The C ABI of the CPU library, driven without Python under the sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.ops import native

ISAS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
AMX = [*ISAS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
ENGINES = {
    "f32_avx2": ISAS["avx2"],
    "f32_avx512": ISAS["avx512"],
    "bf16_avx512": [*ISAS["avx512"], "-mavx512bf16", "-DDDETR_ENGINE_BF16"],
    "bf16_amx": [*AMX, "-DDDETR_ENGINE_AMX"],
    "f32_amx": [*AMX, "-DDDETR_ENGINE_SPLIT"],
}
FLAGS = ["-std=gnu++17", "-fPIC", "-Wno-psabi", "-ffp-contract=off", "-fno-math-errno"]
SANITIZE = ["-O1", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def build_driver(
    builder: Any,
    repository: Path,
    folder: Path,
    flags: list[str],
    *,
    name: str = "driver",
    compiler: str = "",
    **other: Path,
) -> Path:
    """The driver of that name and the whole library; ``other``, by their names, are kernels from elsewhere."""
    source = repository / "csrc"
    is_x86 = platform.machine() in ("x86_64", "AMD64") and not compiler
    has_amx = is_x86 and _takes(shutil.which(os.environ.get("CXX", "c++")) or "g++", AMX)
    macros = (*(["-DDDETR_HAVE_X86_ISAS"] if is_x86 else []), *(["-DDDETR_HAVE_AMX"] if has_amx else []))
    units: list[tuple[Path, tuple[str, ...]]] = [
        (repository / f"tests/native/{name}.cpp", ()),
        *((source / file, macros) for file in ("msda_cpu.cpp", "dense_cpu.cpp", "status.cpp")),
    ]
    for isa, own in ISAS.items():
        if isa == "portable" or is_x86:
            file = other.get(isa, source / "msda_cpu_kernels.cpp")
            units.append((file, (*own, f"-DDDETR_KERNELS=ddetr_kernels_{isa}")))
    for engine, own in ENGINES.items() if is_x86 else ():
        if has_amx or engine in ("f32_avx2", "f32_avx512"):
            file = other.get(engine, source / "dense_cpu_kernels.cpp")
            units.append((file, (*own, f"-DDDETR_DENSE_KERNELS=ddetr_dense_{engine}")))
    flags = [*FLAGS, *flags, f"-I{source / 'include'}"]
    return builder.build(units, flags, folder / name, libraries=["-pthread"], compiler=compiler)  # type: ignore[no-any-return]


def _takes(compiler: str, flags: list[str]) -> bool:
    empty = ["-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run([compiler, *flags, *empty], capture_output=True).returncode == 0


def run_driver(*command: str | Path, **environment: str) -> None:
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failures" in result.stdout
    assert "runtime error" not in result.stderr
    assert "WARNING" not in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("require_native")
@pytest.mark.parametrize("name", ["driver", "dense_driver"])
def test_the_driver_passes_on_the_installed_library(
    builder: Any, repository: Path, tmp_path: Path, name: str
) -> None:
    installed = native.cpu_kernels()
    assert installed is not None
    units = [(repository / f"tests/native/{name}.cpp", ())]
    library = [str(installed.path), f"-Wl,-rpath,{installed.path.parent}", "-pthread"]
    flags = [*FLAGS, "-O1", f"-I{repository / 'csrc/include'}"]
    run_driver(builder.build(units, flags, tmp_path / name, libraries=library))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["driver", "dense_driver"])
def test_it_is_clean_under_address_and_undefined_behaviour_sanitizers(
    builder: Any, repository: Path, tmp_path: Path, name: str
) -> None:
    run_driver(build_driver(builder, repository, tmp_path, SANITIZE, name=name))


@pytest.mark.slow
def test_the_driver_is_clean_under_the_thread_sanitizer(builder: Any, repository: Path, tmp_path: Path) -> None:
    # its shadow memory multiplies the address space that the test of large indices takes
    driver = build_driver(builder, repository, tmp_path, ["-O1", "-fsanitize=thread"])
    run_driver(driver, "--no-large", TSAN_OPTIONS="exitcode=66")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "right", "wrong", "kernels"),
    [
        ("driver", "msda_cpu_points.h", "cell.line + 1 < block.lines[i]", "cell.line < block.lines[i]", "portable"),
        (
            "dense_driver",
            "dense_cpu_maps.h",
            "x < job.width; ++x) {\n        for (int64_t c = 0; c < 3; ++c)",
            "x <= job.width; ++x) {\n        for (int64_t c = 0; c < 3; ++c)",
            "f32_avx2",
        ),
    ],
    ids=["a row too far", "a pixel too many"],
)
def test_the_sanitizers_would_notice(
    builder: Any, repository: Path, tmp_path: Path, name: str, file: str, right: str, wrong: str, kernels: str
) -> None:
    """The same driver on a library of which one copy of the kernels has a mistake: the runs above can fail."""
    if name == "dense_driver" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no dense layers for this processor")
    shutil.copytree(repository / "csrc", tmp_path / "csrc")
    text = (tmp_path / "csrc" / file).read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "csrc" / file).write_text(text.replace(right, wrong), encoding="utf-8")
    mistaken = tmp_path / "csrc" / ("msda_cpu_kernels.cpp" if name == "driver" else "dense_cpu_kernels.cpp")
    driver = build_driver(builder, repository, tmp_path, SANITIZE, name=name, **{kernels: mistaken})
    result = subprocess.run([str(driver), "--no-large"], capture_output=True, text=True, timeout=600)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


@pytest.mark.slow
def test_the_driver_passes_on_aarch64(builder: Any, repository: Path, tmp_path: Path) -> None:
    """The kernels of an ARM build, compiled across and run on an emulated processor."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no compiler or emulator for aarch64 (apt-get install g++-aarch64-linux-gnu qemu-user-static)")
    driver = build_driver(builder, repository, tmp_path, ["-O2", "-static"], compiler=compiler)
    run_driver(emulator, driver, "--no-large")
