"""The C ABI of the CPU library, driven without Python under the sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

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
FLAGS = ["-std=gnu++17", "-g", "-O1", "-fPIC", "-Wno-psabi", "-ffp-contract=off", "-fno-math-errno"]


def build_driver(
    repository: Path,
    folder: Path,
    flags: list[str],
    *,
    name: str = "driver",
    portable_only: bool = False,
    compiler: str | None = None,
) -> Path:
    compiler = compiler or shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, driver = repository / "csrc", folder / name
    command = [compiler, *FLAGS, *flags, f"-I{source / 'include'}"]
    objects, jobs = [], []

    def compile_(name: str, *arguments: str) -> None:
        objects.append(str(folder / name))
        jobs.append(
            subprocess.Popen([*command, *arguments, "-c", "-o", objects[-1]], stderr=subprocess.PIPE, text=True)
        )

    is_x86 = platform.machine() in ("x86_64", "AMD64") and not portable_only
    for isa, isa_flags in ISAS.items():
        if isa == "portable" or is_x86:
            compile_(
                f"{isa}.o", *isa_flags, f"-DDDETR_KERNELS=ddetr_kernels_{isa}", str(source / "msda_cpu_kernels.cpp")
            )
    has_isas = ["-DDDETR_HAVE_X86_ISAS"] if is_x86 else []
    compile_("abi.o", *has_isas, str(source / "msda_cpu.cpp"))
    compile_("status.o", str(source / "status.cpp"))
    compile_("driver.o", str(repository / f"tests/native/{name}.cpp"))
    if name == "dense_driver" or not is_x86:  # elsewhere the op's driver asks for the engines too: there are none
        has_amx = is_x86 and _takes(compiler, AMX)
        compile_("dense.o", *has_isas, *(["-DDDETR_HAVE_AMX"] if has_amx else []), str(source / "dense_cpu.cpp"))
        for engine, engine_flags in ENGINES.items() if is_x86 else ():
            if has_amx or engine in ("f32_avx2", "f32_avx512"):
                kernels = f"-DDDETR_DENSE_KERNELS=ddetr_dense_{engine}"
                compile_(f"dense_{engine}.o", *engine_flags, kernels, str(source / "dense_cpu_kernels.cpp"))
    for job in jobs:
        _, errors = job.communicate()
        if "cannot find" in errors or "unrecognized" in errors:
            pytest.skip(f"this compiler has no {' '.join(flags)}: {errors[:200]}")
        assert job.returncode == 0, errors
    linked = subprocess.run([*command, *objects, "-pthread", "-o", str(driver)], capture_output=True, text=True)
    if "cannot find" in linked.stderr:
        pytest.skip(f"this compiler has no {' '.join(flags)}: {linked.stderr[:200]}")
    assert linked.returncode == 0, linked.stderr
    return driver


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
def test_the_driver_passes_as_it_is(repository: Path, tmp_path: Path) -> None:
    run_driver(build_driver(repository, tmp_path, []))


@pytest.mark.slow
def test_the_driver_is_clean_under_address_and_undefined_behaviour_sanitizers(
    repository: Path, tmp_path: Path
) -> None:
    sanitize = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    run_driver(build_driver(repository, tmp_path, sanitize))


@pytest.mark.slow
def test_the_driver_is_clean_under_the_thread_sanitizer(repository: Path, tmp_path: Path) -> None:
    # its shadow memory multiplies the address space that the test of large indices takes
    run_driver(build_driver(repository, tmp_path, ["-fsanitize=thread"]), "--no-large", TSAN_OPTIONS="exitcode=66")


@pytest.mark.slow
def test_the_dense_layers_are_clean_under_address_and_undefined_behaviour_sanitizers(
    repository: Path, tmp_path: Path
) -> None:
    sanitize = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    run_driver(build_driver(repository, tmp_path, sanitize, name="dense_driver"))


@pytest.mark.slow
def test_the_dense_driver_would_notice_a_pixel_too_many(repository: Path, tmp_path: Path) -> None:
    """The same driver on a library that copies one pixel too many of every line: the run above can fail."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no dense layers for this processor")
    broken = tmp_path / "repository"
    shutil.copytree(repository / "csrc", broken / "csrc")
    shutil.copytree(repository / "tests/native", broken / "tests/native")
    rows = broken / "csrc/dense_cpu_maps.h"
    text = rows.read_text(encoding="utf-8")
    marker = "x < job.width; ++x) {\n        for (int64_t c = 0; c < 3; ++c)"
    assert marker in text
    rows.write_text(text.replace(marker, marker.replace("x < job", "x <= job")), encoding="utf-8")
    driver = build_driver(broken, tmp_path, ["-fsanitize=address"], name="dense_driver")
    result = subprocess.run([str(driver)], capture_output=True, text=True, timeout=600)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


@pytest.mark.slow
def test_the_sanitizers_would_notice(repository: Path, tmp_path: Path) -> None:
    """The same driver on a library that reads one row too far: the run above can fail."""
    broken = tmp_path / "repository"
    shutil.copytree(repository / "csrc", broken / "csrc")
    shutil.copytree(repository / "tests/native", broken / "tests/native")
    kernels = broken / "csrc/msda_cpu_points.h"
    text = kernels.read_text(encoding="utf-8")
    marker = "cell.line + 1 < block.lines[i]"
    assert marker in text
    kernels.write_text(text.replace(marker, "cell.line < block.lines[i]"), encoding="utf-8")
    driver = build_driver(broken, tmp_path, ["-fsanitize=address"], portable_only=True)
    result = subprocess.run([str(driver), "--no-large"], capture_output=True, text=True, timeout=600)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


@pytest.mark.slow
def test_the_driver_passes_on_aarch64(repository: Path, tmp_path: Path) -> None:
    """The kernels of an ARM build, compiled across and run on an emulated processor."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no compiler or emulator for aarch64 (apt-get install g++-aarch64-linux-gnu qemu-user-static)")
    driver = build_driver(repository, tmp_path, ["-O2", "-static"], portable_only=True, compiler=compiler)
    run_driver(emulator, driver, "--no-large")
