"""The dense layers of every engine of this processor against PyTorch's own."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import dense, dense_abi, native
from ddetr_cli.ops.dense import DenseEngine, Map, dense_engine, gains_by_bf16

C_TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "ddetr_parallel_for": ctypes.c_void_p,
    "const float*": ctypes.c_void_p,
    "float*": ctypes.c_void_p,
    "const void*": ctypes.c_void_p,
    "void*": ctypes.c_void_p,
    "const int64_t*": ctypes.c_void_p,
    "ddetr_engine_form*": ctypes.POINTER(dense_abi.EngineForm),
    "const ddetr_product*": ctypes.POINTER(dense_abi.Product),
    "const ddetr_attention_inputs*": ctypes.POINTER(dense_abi.AttentionInputs),
    "const ddetr_feed_forward*": ctypes.POINTER(dense_abi.FeedForward),
    "const ddetr_group_norm*": ctypes.POINTER(dense_abi.GroupNorm),
    "const ddetr_crew*": ctypes.POINTER(dense_abi.Crew),
}

# Sums of products of numbers of order 1, a few hundred of them; bfloat16 keeps 8 bits of each.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def header(repository: Path) -> str:
    text = (repository / "csrc/include/ddetr_dense.h").read_text(encoding="utf-8")
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def test_every_prototype_of_the_header_is_declared_alike_in_python(header: str) -> None:
    found = {}
    for result, name, arguments in re.findall(r"DDETR_API\s+([\w\s*]+?)\s*\b(ddetr_\w+)\(([^)]*)\);", header):
        types = [a.strip().rpartition(" ")[0] for a in arguments.split(",")]
        found[name] = (C_TYPES[result], [C_TYPES[t] for t in types])
    assert found == dense_abi.PROTOTYPES


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("engine_form", dense_abi.EngineForm),
        ("crew", dense_abi.Crew),
        ("product", dense_abi.Product),
        ("attention_inputs", dense_abi.AttentionInputs),
        ("feed_forward", dense_abi.FeedForward),
        ("group_norm", dense_abi.GroupNorm),
    ],
)
def test_every_struct_has_the_fields_of_the_header(header: str, name: str, structure: type[ctypes.Structure]) -> None:
    match = re.search(rf"typedef struct ddetr_{name} \{{(.*?)\}}", header, flags=re.DOTALL)
    assert match is not None
    fields = []
    for kind, names in re.findall(r"((?:const )?\w+)\b([^;]+);", match[1]):
        for field in names.split(","):
            is_pointer = "*" in field
            fields.append((field.replace("*", "").strip(), ctypes.c_void_p if is_pointer else C_TYPES[kind.strip()]))
    assert fields == structure._fields_


@dataclass
class Bench:
    """An engine, two threads of it, and memory that is kept alive."""

    engine: DenseEngine
    crew: dense_abi.Crew
    kept: list[Tensor]

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.engine.dtype]

    def rounded(self, *shape: int) -> Tensor:
        """Random numbers that the engine's elements hold exactly."""
        return torch.randn(*shape).to(self.engine.dtype).float()

    def map_of(self, x: Tensor, border: int) -> Map:
        """A map (C,h,w) in memory of its own, its border zero."""
        channels, h, w = x.shape
        memory = torch.zeros(h + 2 * border, w + 2 * border, channels, dtype=self.engine.dtype)
        memory[border : border + h, border : border + w] = x.permute(1, 2, 0)
        self.kept.append(memory)
        inset = border * (w + 2 * border + 1) * channels * memory.itemsize
        return Map(memory.data_ptr() + inset, h, w, channels, border)

    def empty_map(self, channels: int, h: int, w: int, border: int) -> tuple[Map, Tensor]:
        """A map, and its memory (h+2b,w+2b,C)."""
        place = self.map_of(torch.zeros(channels, h, w), border)
        return place, self.kept[-1]


def engine_numbers() -> Iterator[int]:
    """The engines of this processor, and one for a test that says there are none."""
    kernels = native.cpu_kernels()
    found = []
    if kernels is not None and hasattr(kernels.library, "ddetr_dense_engine"):
        orders = (
            (torch.float32, ["fp32 AVX2", "fp32 AVX-512", "fp32 AMX"]),
            (torch.bfloat16, ["bf16 AVX-512", "bf16 AMX"]),
        )
        for dtype, names in orders:
            best = dense_engine(dtype)
            usable = [] if best is None else names[: names.index(best.name) + 1]
            found += [dense.ENGINES.index(name) for name in usable]
    yield from found or [-1]


@pytest.fixture(params=[pytest.param(n, id=dense.ENGINES[n] if n >= 0 else "none") for n in engine_numbers()])
def bench(request: pytest.FixtureRequest, require_native: None) -> Bench:
    if request.param < 0:
        pytest.skip("this processor has none of the dense engines")
    kernels = native.cpu_kernels()
    assert kernels is not None
    engine = DenseEngine(kernels.library, request.param, kernels.parallel_for)
    scratch = torch.empty(2 * engine.scratch_bytes(128, 256), dtype=torch.uint8)
    torch.manual_seed(0)
    return Bench(engine, engine.crew(2, scratch), [scratch])


def assert_close(bench: Bench, got: Tensor, wanted: Tensor) -> None:
    error = (got.float() - wanted).abs().max().item() / wanted.abs().max().item()
    assert error <= bench.tolerance


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "size"),
    [(1, 1, 1, (7, 11)), (1, 2, 1, (9, 12)), (3, 1, 1, (10, 40)), (3, 2, 1, (13, 70)), (3, 1, 2, (9, 33))],
    ids=["1x1", "1x1 stride 2", "3x3", "3x3 stride 2", "3x3 dilated"],
)
def test_a_convolution_agrees_with_pytorch(
    bench: Bench, kernel: int, stride: int, dilation: int, size: tuple[int, int]
) -> None:
    padding = dilation * (kernel // 2)
    x, weight, bias = bench.rounded(64, *size), bench.rounded(96, 64, kernel, kernel) / 16, torch.randn(96)
    wanted = F.conv2d(x[None], weight, bias, stride, padding, dilation)[0]
    to, memory = bench.empty_map(96, wanted.shape[1], wanted.shape[2], border=1)
    packed = bench.engine.pack(weight, bias)
    source = bench.map_of(x, padding)
    bench.engine.convolution(bench.crew, packed, source, to, stride=stride, padding=padding, dilation=dilation)()
    assert_close(bench, memory[1:-1, 1:-1].permute(2, 0, 1), wanted)


def test_a_convolution_leaves_the_border_of_its_output_alone(bench: Bench) -> None:
    to, memory = bench.empty_map(32, 6, 9, border=1)
    packed = bench.engine.pack(bench.rounded(32, 64, 3, 3), torch.ones(32))
    bench.engine.convolution(bench.crew, packed, bench.map_of(bench.rounded(64, 6, 9), 1), to, padding=1)()
    inside = torch.zeros(8, 11, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    assert (memory[~inside] == 0).all()
    assert (memory[inside] != 0).any()


def test_a_convolution_adds_to_what_is_there_and_cuts_off_below_zero(bench: Bench) -> None:
    x, there, weight = bench.rounded(64, 5, 37), bench.rounded(32, 5, 37), bench.rounded(32, 64, 1, 1) / 8
    to = bench.map_of(there, 0)
    memory = bench.kept[-1]
    bench.engine.convolution(
        bench.crew, bench.engine.pack(weight, None), bench.map_of(x, 0), to, relu=True, added=to
    )()
    assert_close(bench, memory.permute(2, 0, 1), F.relu(F.conv2d(x[None], weight)[0] + there))


@pytest.mark.parametrize(
    ("kernel", "stride", "border"),
    [(1, 1, 0), (1, 1, 1), (1, 2, 0), (3, 1, 1), (3, 2, 1)],
    ids=["lines without gaps", "a border", "stride 2", "3x3 and gaps in both", "3x3 and stride 2"],
)
def test_a_second_input_is_summed_with_a_convolution(bench: Bench, kernel: int, stride: int, border: int) -> None:
    x, weight = bench.rounded(64, 9, 37), bench.rounded(96, 64, kernel, kernel) / 16
    size = (9, 37) if stride == 1 else (17, 74)  # a stride leaves a last line or column out, or not
    second, second_weight = bench.rounded(128, *size), bench.rounded(96, 128) / 16
    bias = torch.randn(96)
    wanted = F.conv2d(x[None], weight, bias, padding=kernel // 2)
    wanted = F.relu(wanted + F.conv2d(second[None], second_weight[:, :, None, None], stride=stride))[0]
    to, memory = bench.empty_map(96, 9, 37, border=1)
    bench.engine.convolution(
        bench.crew,
        bench.engine.pack(weight, bias, second_weight),
        bench.map_of(x, kernel // 2),
        to,
        padding=kernel // 2,
        relu=True,
        second=bench.map_of(second, border),
        second_stride=stride,
    )()
    assert_close(bench, memory[1:-1, 1:-1].permute(2, 0, 1), wanted)
    memory[1:-1, 1:-1] = 0
    assert not memory.any()


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 47, 300])
def test_a_linear_layer_agrees_with_pytorch_for_any_number_of_rows(bench: Bench, rows: int) -> None:
    x, weight, bias = bench.rounded(rows, 64), bench.rounded(91, 64) / 8, torch.randn(91)
    to, elements = torch.full((rows, 91), torch.nan), x.to(bench.engine.dtype)
    packed = bench.engine.pack(weight, bias)
    bench.engine.linear(bench.crew, packed, elements, to)()
    wanted = F.linear(x, weight, bias)
    assert (to - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # bfloat16 too: the sums are float


def test_a_linear_layer_writes_head_by_head(bench: Bench) -> None:
    x, weight = bench.rounded(50, 64), bench.rounded(64, 64) / 8
    to = torch.empty(2, 50, 32, dtype=bench.engine.dtype)
    packed, elements = bench.engine.pack(weight, None), x.to(bench.engine.dtype)
    bench.engine.linear(bench.crew, packed, elements, to, heads=2)()
    assert_close(bench, to, F.linear(x, weight).view(50, 2, 32).transpose(0, 1))


@pytest.mark.parametrize("first", [0, 1], ids=["on a line", "off it"])
def test_every_number_of_a_large_output_is_written_and_none_beside_it(bench: Bench, first: int) -> None:
    rows, columns = 33_001, 96
    x, weight, bias = bench.rounded(rows, 64), bench.rounded(columns, 64) / 8, torch.randn(columns)
    memory = torch.full((rows * columns + 65,), 7.0, dtype=bench.engine.dtype)
    shift = (-memory.data_ptr() % 64) // memory.itemsize + first
    to = memory[shift : shift + rows * columns].view(rows, columns)
    bench.engine.linear(bench.crew, bench.engine.pack(weight, bias), x.to(bench.engine.dtype), to)()
    assert_close(bench, to, F.linear(x, weight, bias))
    assert (torch.cat((memory[:shift], memory[shift + rows * columns :])) == 7).all()


def test_a_large_convolution_and_heads_of_many_rows_are_written_whole_and_their_border_left(bench: Bench) -> None:
    x, weight = bench.rounded(32, 150, 301), bench.rounded(64, 32, 1, 1) / 4
    to, memory = bench.empty_map(64, 150, 301, border=1)
    packed = bench.engine.pack(weight, None)
    bench.engine.convolution(bench.crew, packed, bench.map_of(x, 0), to)()
    wanted = F.conv2d(x[None], weight)[0]
    assert_close(bench, memory[1:-1, 1:-1].permute(2, 0, 1), wanted)
    memory[1:-1, 1:-1] = 0
    assert not memory.any()

    rows = x.flatten(1).T.to(bench.engine.dtype).contiguous()
    heads = torch.empty(2, 150 * 301, 32, dtype=bench.engine.dtype)
    bench.engine.linear(bench.crew, packed, rows, heads, heads=2)()
    assert_close(bench, heads, wanted.view(2, 32, -1).transpose(1, 2))


def test_nan_passes_through_a_convolution_that_cuts_off_below_zero(bench: Bench) -> None:
    x = torch.ones(64, 1, 3)
    x[:, 0, 1] = torch.nan
    to, memory = bench.empty_map(32, 1, 3, border=0)
    packed = bench.engine.pack(torch.ones(32, 64, 1, 1), None)
    bench.engine.convolution(bench.crew, packed, bench.map_of(x, 0), to, relu=True)()
    assert memory[0, :, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("lines_of_the_first", [9, 1200], ids=["small", "past the caches"])
def test_attention_inputs_are_two_linear_layers_of_memory_and_of_placed_memory(
    bench: Bench, lines_of_the_first: int
) -> None:
    height, channels = lines_of_the_first, 128
    level_hw = [height, 14, 5, 7]
    rows = height * 14 + 5 * 7
    x, lines, columns = bench.rounded(rows, channels), torch.randn(height + 5, 64), torch.randn(21, 64)
    value_weight, projection_weight = bench.rounded(128, 128) / 11, bench.rounded(96, 128) / 11
    value_bias, projection_bias = torch.randn(128), torch.randn(96)
    position = torch.cat(
        [
            torch.cat((lines[a : a + h, None].expand(h, w, 64), columns[b : b + w].expand(h, w, 64)), -1).flatten(
                0, 1
            )
            for a, b, h, w in ((0, 0, height, 14), (height, 14, 5, 7))
        ]
    )
    packed = bench.engine.pack(value_weight, value_bias), bench.engine.pack(projection_weight, projection_bias)
    value = torch.empty(4, rows, 32, dtype=bench.engine.dtype)
    projected, elements = torch.empty(rows, 96), x.to(bench.engine.dtype)
    bench.engine.attention_inputs(
        bench.crew, *packed, elements, (lines, columns), level_hw, value, projected, heads=4
    )()
    wanted = F.linear(x, value_weight, value_bias).view(rows, 4, 32).transpose(0, 1)
    assert_close(bench, value, wanted)
    assert_close(bench, projected, F.linear(x + position, projection_weight, projection_bias))


@pytest.mark.parametrize("is_float", [False, True], ids=["elements", "floats"])
@pytest.mark.parametrize("rows", [1, 130, 401])
def test_feed_forward_is_the_rest_of_a_transformer_layer(bench: Bench, rows: int, is_float: bool) -> None:
    C, hidden = 128, 256
    sampled, x = bench.rounded(rows, C), bench.rounded(rows, C)
    weights = [bench.rounded(C, C) / 11, bench.rounded(hidden, C) / 11, bench.rounded(C, hidden) / 16]
    biases = [torch.randn(C), torch.randn(hidden), torch.randn(C)]
    norms = (torch.rand(C) + 0.5, torch.randn(C)), (torch.rand(C) + 0.5, torch.randn(C))
    packed = [bench.engine.pack(w, b) for w, b in zip(weights, biases, strict=True)]
    y = F.layer_norm(x + F.linear(sampled, weights[0], biases[0]), (C,), *norms[0])
    wanted = F.layer_norm(
        y + F.linear(F.relu(F.linear(y, weights[1], biases[1])), weights[2], biases[2]), (C,), *norms[1]
    )
    sampled, x = sampled.to(bench.engine.dtype), x.to(torch.float32 if is_float else bench.engine.dtype)
    bench.engine.feed_forward(bench.crew, packed[0], packed[1], packed[2], *norms, 1e-5, sampled, x, x)()
    assert_close(bench, x, wanted)


def test_a_group_norm_agrees_with_pytorch_far_from_zero(bench: Bench) -> None:
    x, weight, bias = torch.randn(200, 128) + 50, torch.randn(128), torch.randn(128)
    to, partials = torch.empty(200, 128, dtype=bench.engine.dtype), torch.empty(4, 128, 2)
    bench.engine.group_norm(bench.crew, x, 32, weight, bias, 1e-5, partials, to)()
    wanted = F.group_norm(x.T[None].double(), 32, weight.double(), bias.double())[0].T.float()
    # The product of mean and scale, some 50, is rounded to float.
    error = (to.float() - wanted).abs().max().item()
    assert error <= (3e-5 if bench.engine.dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("size", [(8, 12), (9, 13)])
def test_pooling_takes_the_largest_of_nine(bench: Bench, size: tuple[int, int]) -> None:
    x = bench.rounded(64, *size).relu()
    wanted = F.max_pool2d(x, 3, 2, 1)
    to, memory = bench.empty_map(64, wanted.shape[1], wanted.shape[2], border=0)
    bench.engine.max_pool(bench.crew, bench.map_of(x, 1), to)()
    assert torch.equal(memory.permute(2, 0, 1).float(), wanted)


def test_pixels_are_laid_out_in_fours(bench: Bench) -> None:
    pixels = bench.rounded(3, 5, 6)
    to, memory = bench.empty_map(4, 5, 6, border=2)
    bench.engine.load_pixels(bench.crew, pixels, to)
    assert torch.equal(memory[2:-2, 2:-2, :3].permute(2, 0, 1).float(), pixels)
    assert (memory[2:-2, 2:-2, 3] == 0).all()


def test_a_width_that_the_kernels_do_not_take_is_refused(bench: Bench) -> None:
    norm = torch.ones(8)
    with pytest.raises(KernelError, match="ddetr_dense_group_norm: failed with code -1"):
        bench.engine.group_norm(
            bench.crew, torch.ones(3, 8), 4, norm, norm, 1e-5, torch.empty(16), torch.empty(3, 8)
        )()


def test_a_float_is_the_sum_of_its_three_parts() -> None:
    weights = torch.randn(2, 3, 16, 32, 2) * 10.0 ** torch.randint(-20, 20, (2, 3, 16, 32, 2))
    parts = dense._in_three_parts(weights)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().sum(2), weights.double())


def test_fp32_products_are_as_exact_as_floats_allow(bench: Bench) -> None:
    if bench.engine.dtype != torch.float32:
        pytest.skip("an engine of bfloat16")
    x, weight = torch.randn(40, 1024), torch.randn(64, 1024)
    to = torch.empty(40, 64)
    bench.engine.linear(bench.crew, bench.engine.pack(weight, None), x, to)()
    exact = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    # Of a sum of 1024 products in float: far below the 1024 half units of the last place that are the worst case.
    assert ((to.double() - exact).abs() / sizes).max().item() <= 4 * 2**-24


@pytest.mark.usefixtures("require_native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amx_is_left_out_where_no_more_than_avx512_is_wanted(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, best = native.cpu_kernels(), dense_engine(dtype)
    assert installed is not None
    if best is None or not best.name.endswith("AMX"):
        pytest.skip("this processor or this build has no AMX")
    monkeypatch.setattr(native, "cpu_kernels", lambda: replace(installed, limit="avx512"))
    limited = dense_engine(dtype)
    assert limited is not None
    assert limited.name == best.name.replace("AMX", "AVX-512")


@pytest.mark.usefixtures("require_native")
@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="no Linux")
@pytest.mark.parametrize("limit", ["best", "avx512", "avx2"])
def test_bf16_is_a_gain_with_amx_and_on_amds_processors(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = native.cpu_kernels()
    assert installed is not None
    if installed.library.ddetr_cpu_isa(native._ISAS[limit]) < 0:
        pytest.skip(f"this processor or this build has no {limit}")
    monkeypatch.setattr(native, "cpu_kernels", lambda: replace(installed, limit=limit))
    engine = dense_engine(torch.bfloat16)
    is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert gains_by_bf16() == (engine is not None and (engine.name == "bf16 AMX" or not is_intel))


def test_without_native_kernels_there_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_kernels", lambda: None)
    assert dense_engine(torch.float32) is None
    assert not gains_by_bf16()
