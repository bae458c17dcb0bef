"""The boundary to the libraries: its declaration, and what happens where one is missing, broken or foreign."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import msda, native

C_TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "const char*": ctypes.c_char_p,
    "const ddetr_msda_dims*": ctypes.POINTER(native.Dims),
    "const int64_t*": ctypes.POINTER(ctypes.c_int64),
    "const void*": ctypes.c_void_p,
    "void*": ctypes.c_void_p,
    "ddetr_parallel_for": ctypes.c_void_p,
}


@pytest.fixture
def header(repository: Path) -> str:
    text = (repository / "csrc/include/ddetr.h").read_text(encoding="utf-8")
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def test_every_prototype_of_the_header_is_declared_alike_in_python(header: str) -> None:
    found = {}
    for result, name, arguments in re.findall(r"DDETR_API\s+([\w\s*]+?)\s*\b(ddetr_\w+)\(([^)]*)\);", header):
        types = [] if arguments.strip() == "void" else [a.strip().rpartition(" ")[0] for a in arguments.split(",")]
        found[name] = (C_TYPES[result], [C_TYPES[t] for t in types])
    assert found == native.PROTOTYPES


def test_the_struct_of_sizes_has_the_fields_of_the_header(header: str) -> None:
    match = re.search(r"typedef struct ddetr_msda_dims \{(.*?)\}", header, flags=re.DOTALL)
    assert match is not None
    fields = re.findall(r"(\w+)\s+(\w+);", match[1])
    assert [(name, C_TYPES[kind]) for kind, name in fields] == native.Dims._fields_


def test_the_constants_are_those_of_the_header(header: str) -> None:
    constants = {name: int(number) for name, number in re.findall(r"#define DDETR_(\w+) \(?(-?\d+)\)?", header)}
    assert constants["ABI_VERSION"] == native.ABI_VERSION
    assert constants["FUSED_MAX_SAMPLES"] == native.FUSED_MAX_SAMPLES
    assert constants["MAX_BANDS"] == native.MAX_BANDS
    names = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}
    for dtype, number in native._DTYPES.items():
        assert number == constants[f"DTYPE_{names[str(dtype).removeprefix('torch.')]}"]
    for isa, number in native._ISAS.items():
        assert number == constants[f"ISA_{isa.upper()}"]


@pytest.mark.usefixtures("require_native")
def test_every_error_code_has_a_sentence(header: str) -> None:
    installed = native.cpu_kernels()
    assert installed is not None
    codes = [int(code) for code in re.findall(r"#define DDETR_ERROR_\w+ \((-\d+)\)", header)]
    texts = [installed.library.ddetr_error_string(code).decode() for code in (0, *codes, -999)]
    assert len(set(texts)) == len(codes) + 2
    assert texts[-1] == "an unknown error code"


@pytest.mark.usefixtures("require_native")
def test_the_kernels_run_in_the_thread_pool_of_torch() -> None:
    installed = native.cpu_kernels()
    assert installed is not None
    assert installed.parallel_for is not None


@pytest.mark.usefixtures("require_native")
def test_a_failing_thread_pool_is_reported_not_ignored() -> None:
    installed = native.cpu_kernels()
    assert installed is not None
    form = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_void_p)
    refuse = form(lambda *_: 1)
    broken = native.CpuKernels(
        installed.path, installed.isa, installed.library, ctypes.cast(refuse, ctypes.c_void_p).value
    )
    with pytest.raises(KernelError, match="thread pool"):
        broken.forward(*one_point())


@pytest.mark.usefixtures("require_native")
def test_sizes_beyond_64_bits_are_refused_before_any_memory_is_touched() -> None:
    installed = native.cpu_kernels()
    assert installed is not None
    dims = native.Dims(2**31, 2**20, 8, 32, 2**31, 1, 4)
    levels = (ctypes.c_int64 * 2)(2**10, 2**10)
    forward = installed.library.ddetr_msda_forward_cpu(dims, 0, levels, *[None] * 6, 0, 0, None)
    backward = installed.library.ddetr_msda_backward_cpu(dims, 0, levels, *[None] * 9, 0, 1, 0, None)
    for status in (forward, backward):
        assert installed.library.ddetr_error_string(status) == installed.library.ddetr_error_string(-1)


@pytest.mark.usefixtures("fresh_kernels")
class TestALibraryThatIsNotRight:
    """Found through DDETR_NATIVE_DIR; a broken one is an error at every call, never replaced by the reference."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("DDETR_NATIVE_DIR", str(tmp_path))
        monkeypatch.delenv("DDETR_REQUIRE_NATIVE", raising=False)
        return tmp_path

    def test_missing_is_replaced_by_the_reference_with_one_warning(self) -> None:
        with pytest.warns(RuntimeWarning, match="no native cpu kernels") as warned:
            results = [msda(*one_point()).item() for _ in range(3)]
        assert results == [1.0, 1.0, 1.0]
        assert len(warned) == 1

    @pytest.mark.parametrize("value", ["1", "true", "yes"])
    def test_missing_is_an_error_where_it_is_required(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DDETR_REQUIRE_NATIVE", value)
        for _ in range(2):
            with pytest.raises(KernelError, match="DDETR_REQUIRE_NATIVE is set"):
                msda(*one_point())

    def test_not_a_library_is_an_error(self, folder: Path) -> None:
        (folder / "libddetr_cpu.so").write_bytes(b"\x7fELF and nothing else")
        for _ in range(2):
            with pytest.raises(KernelError, match="cannot be loaded"):
                msda(*one_point())

    def test_of_another_abi_is_an_error(self, folder: Path) -> None:
        compile_library(folder, "int ddetr_abi_version(void) { return 999; }")
        with pytest.raises(KernelError, match="ABI 999"):
            msda(*one_point())

    def test_without_a_function_it_should_have_is_an_error(self, folder: Path) -> None:
        compile_library(folder, RIGHT_VERSION, functions=())
        with pytest.raises(KernelError, match="cannot be loaded"):
            msda(*one_point())

    def test_that_computes_nothing_fails_its_self_test(self, folder: Path) -> None:
        compile_library(folder, RIGHT_VERSION)  # its kernels return 0, and that is all
        with pytest.raises(KernelError, match="computes a wrong output"):
            msda(*one_point())

    def test_that_reports_a_failure_raises_it(self, folder: Path) -> None:
        compile_library(folder, RIGHT_VERSION, result="-1")
        with pytest.raises(KernelError, match=r"failed with code -1 \(a sentence\)"):
            msda(*one_point())


@pytest.mark.usefixtures("require_native", "fresh_kernels")
def test_an_instruction_set_nobody_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    native._load_cpu.cache_clear()
    monkeypatch.setenv("DDETR_CPU_ISA", "mmx")
    with pytest.raises(KernelError, match="not an instruction set"):
        msda(*one_point())


def one_point() -> tuple[torch.Tensor, list[int], torch.Tensor, torch.Tensor]:
    xy = torch.full((1, 1, 1, 1, 1, 2), 0.5)
    return torch.ones(1, 4, 1, 1), [2, 2], xy, torch.ones(1, 1, 1, 1, 1)


STUBS = tuple(name for name in native.PROTOTYPES if name not in ("ddetr_abi_version", "ddetr_error_string"))
RIGHT_VERSION = f"int ddetr_abi_version(void) {{ return {native.ABI_VERSION}; }}"


def compile_library(folder: Path, code: str, functions: tuple[str, ...] = STUBS, result: str = "0") -> None:
    """A libddetr_cpu.so of stubs."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build a wrong library with")
    code += '\nconst char* ddetr_error_string(int code) { return "a sentence"; }\n'
    for name in functions:
        code += f"int {name}() {{ return {1 if name == 'ddetr_cpu_isa' else result}; }}\n"
    (folder / "wrong.c").write_text(code, encoding="utf-8")
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libddetr_cpu.so"), str(folder / "wrong.c")]
    subprocess.run(command, check=True, capture_output=True)
