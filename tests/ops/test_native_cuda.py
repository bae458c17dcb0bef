"""The CUDA kernels: their boundary, and, on an emulated GPU, what no number of right results would show."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr_cli.errors import KernelError
from ddetr_cli.ops import native, native_cuda, reference
from ddetr_cli.ops.native_cuda import CudaKernels

C_TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "const char*": ctypes.c_char_p,
    "const ddetr_msda_dims*": ctypes.POINTER(native.Dims),
    "const int64_t*": ctypes.POINTER(ctypes.c_int64),
    "const void*": ctypes.c_void_p,
    "void*": ctypes.c_void_p,
}


@pytest.fixture
def header(repository: Path) -> str:
    text = (repository / "csrc/include/ddetr_cuda.h").read_text(encoding="utf-8")
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def test_every_prototype_of_the_header_is_declared_alike_in_python(header: str) -> None:
    found = {}
    for result, name, arguments in re.findall(r"DDETR_API\s+([\w\s*]+?)\s*\b(ddetr_\w+)\(([^)]*)\);", header):
        types = [argument.strip().rpartition(" ")[0] for argument in arguments.split(",")]
        found[name] = (C_TYPES[result], [C_TYPES[t] for t in types])
    declared = {name: form for name, form in native_cuda.PROTOTYPES.items() if name not in native.PROTOTYPES}
    assert found == declared


def test_the_numbers_of_the_kernels_are_those_of_the_header(header: str) -> None:
    constants = {name: int(number) for name, number in re.findall(r"#define DDETR_CUDA_(\w+) (\d+)", header)}
    assert constants.pop("MAX_LEVELS") > 0
    assert {name.replace("_", " ").lower(): number for name, number in constants.items()} == native_cuda.KERNELS


@pytest.mark.parametrize(("value", "expected"), [("", "plain"), ("plain", "plain"), ("fast", "fast")])
def test_the_environment_chooses_the_kernels(value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_CUDA_KERNELS", value)
    assert native_cuda.wanted_kernels(NO_LIBRARY).kernels == expected


def test_an_unknown_name_of_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_CUDA_KERNELS", "fastest")
    with pytest.raises(KernelError, match=r"DDETR_CUDA_KERNELS=fastest: unknown\. Use plain or fast"):
        native_cuda.wanted_kernels(NO_LIBRARY)


NO_LIBRARY = CudaKernels(Path("libddetr_cuda.so"), ctypes.CDLL(None))
FORMS = [name for name in native_cuda.KERNELS if name != "fast"]
Inputs = tuple[Tensor, list[int], Tensor, Tensor]


def encoder_like(dtype: torch.dtype = torch.float32, heads: int = 2) -> Inputs:
    """A query for every position of three levels, points around it; sizes that no tile and no block divides."""
    level_hw, generator = [11, 13, 6, 7, 3, 4], torch.Generator().manual_seed(3)
    sizes = list(zip(level_hw[::2], level_hw[1::2], strict=True))
    places = [
        ((torch.cartesian_prod(torch.arange(h), torch.arange(w)) + 0.5) / torch.tensor([h, w])) for h, w in sizes
    ]
    centre = torch.cat(places).flip(-1)
    noise = torch.randn(2, len(centre), heads, 3, 4, 2, generator=generator) * 0.08
    value = torch.randn(2, len(centre), heads, 32, generator=generator).to(dtype)
    weights = torch.rand(2, len(centre), heads, 3, 4, generator=generator)
    return value, level_hw, (centre[None, :, None, None, None] + noise).contiguous(), weights


def all_results(kernels: CudaKernels, inputs: Inputs, *, deterministic: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    value, _, xy, _ = inputs
    grad_output = torch.randn(2, xy.shape[1], value.shape[2] * 32, generator=generator).to(value.dtype)
    return [kernels.forward(*inputs), *kernels.backward(grad_output, *inputs, deterministic=deterministic)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_which_thread_comes_first(
    emulated: CudaKernels, form: str, dtype: torch.dtype
) -> None:
    kernels, inputs = replace(emulated, kernels=form), encoder_like(dtype)
    expected = all_results(kernels, inputs, deterministic=True)
    for order in (1, 2):
        emulated.library.emulated_order(order)
        for result, wanted in zip(all_results(kernels, inputs, deterministic=True), expected, strict=True):
            assert torch.equal(result, wanted)
        # by atomics only up to the order of the sums, and in 16 bits up to a rounding of the result
        difference = (all_results(kernels, inputs, deterministic=False)[1] - expected[1]).abs().max()
        assert difference <= (1e-5 if dtype == torch.float32 else 2**-7) * expected[1].abs().max()


@pytest.mark.slow
def test_the_deterministic_gradient_equals_the_reference_where_many_samples_share_a_cell(
    emulated: CudaKernels,
) -> None:
    value, level_hw, xy, weights = encoder_like()
    xy[:, :, 0] = 0.31  # of the first head all in one cell: windows and blocks of the sort are full of it
    inputs = (value, level_hw, xy, weights)
    grad_output = torch.ones(2, xy.shape[1], 64)
    wanted = reference.msda_backward(grad_output.double(), value.double(), level_hw, xy.double(), weights.double())
    found = emulated.backward(grad_output, *inputs, deterministic=True)
    assert (found[0] - wanted[0]).abs().max() <= 1e-5 * wanted[0].abs().max()


@pytest.mark.slow
def test_few_queries_get_a_warp_each_and_many_only_the_lanes_of_their_channels(emulated: CudaKernels) -> None:
    value, level_hw, xy, weights = encoder_like(torch.bfloat16)
    inputs = (value, level_hw, xy, weights)
    fast, rows, warps = (replace(emulated, kernels=name) for name in ("fast", "fast rows", "fast warps"))
    wanted = {name: kernels.forward(*inputs) for name, kernels in (("rows", rows), ("warps", warps))}
    assert not torch.equal(wanted["rows"], wanted["warps"])  # sums in another order
    assert torch.equal(fast.forward(*inputs), wanted["warps"])
    emulated.library.emulated_processors(1)
    assert torch.equal(fast.forward(*inputs), wanted["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_value_with_gaps_is_read_where_it_lies(emulated: CudaKernels, form: str) -> None:
    value, level_hw, xy, weights = encoder_like()
    kernels = replace(emulated, kernels=form)
    wide = torch.full((2, value.shape[1], 192), torch.nan)
    wide[..., 64:128] = value.flatten(2)
    part = wide[..., 64:128].view(value.shape)
    assert part.data_ptr() != native.with_channels_side_by_side(part).contiguous().data_ptr()
    assert torch.equal(kernels.forward(part, level_hw, xy, weights), kernels.forward(value, level_hw, xy, weights))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [1, 2])
def test_a_value_that_is_not_aligned_is_left_to_the_plain_kernels(emulated: CudaKernels, offset: int) -> None:
    value, level_hw, xy, weights = encoder_like()
    loose = torch.cat([value.new_zeros(offset), value.flatten()])[offset:].view(value.shape)
    fast = replace(emulated, kernels="fast rows")
    assert torch.equal(fast.forward(loose, level_hw, xy, weights), emulated.forward(value, level_hw, xy, weights))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_images_past_2_to_the_31_elements_are_found(emulated: CudaKernels, form: str) -> None:
    # address space without memory behind it: the last image alone is read
    batch, side, channels = 9, 4096, 16
    value = torch.empty(batch, side * side, 1, channels, dtype=torch.float16)
    assert value.numel() > 2**31
    value[-1].view(side, side, channels)[-1, -1] = torch.arange(channels)
    xy = torch.full((batch, 1, 1, 1, 1, 2), torch.nan)
    xy[-1] = 1 - 0.5 / side
    output = replace(emulated, kernels=form).forward(value, [side, side], xy, torch.ones(batch, 1, 1, 1, 1))
    assert output[-1, 0].tolist() == list(range(channels))
    assert not output[:-1].any()


@pytest.mark.slow
def test_an_image_past_2_to_the_31_elements_is_left_to_the_plain_kernels(emulated: CudaKernels) -> None:
    side, channels = 1 << 14, 16
    value = torch.empty(1, side * side, 1, channels, dtype=torch.float16)
    assert value.numel() > 2**31
    value.view(side, side, channels)[-1, -1] = 3
    inputs = (value, [side, side], torch.full((1, 1, 1, 1, 1, 2), 1 - 0.5 / side), torch.ones(1, 1, 1, 1, 1))
    assert replace(emulated, kernels="fast rows").forward(*inputs).tolist() == [[[3.0] * channels]]


@pytest.mark.slow
class TestRefusals:
    """Codes come back from the library and are raised; nothing is written."""

    def test_a_device_that_is_not_there(self, emulated: CudaKernels, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native_cuda, "device_and_stream", lambda tensor: (1, 0))
        with pytest.raises(KernelError, match=r"code 101 \(invalid device\)"):
            emulated.forward(*encoder_like())

    def test_more_levels_than_an_argument_holds(self, emulated: CudaKernels) -> None:
        value, xy = torch.ones(1, 65, 1, 4), torch.full((1, 1, 1, 65, 1, 2), 0.5)
        with pytest.raises(KernelError, match="more levels than the CUDA kernels take"):
            emulated.forward(value, [1, 1] * 65, xy, torch.ones(1, 1, 1, 65, 1))

    def test_more_samples_than_can_be_sorted(self, emulated: CudaKernels) -> None:
        dims = native.Dims(1, 1, 1, 4, 2**27, 1, 16)
        levels = (ctypes.c_int64 * 2)(1, 1)
        code = emulated.library.ddetr_msda_backward_sorted_bytes(dims, 0, levels)
        assert emulated.library.ddetr_error_string(code).decode() == "more samples in an image than can be sorted"

    def test_a_workspace_that_is_too_small(self, emulated: CudaKernels) -> None:
        value, level_hw, *_ = encoder_like()
        problem = native.problem(value, level_hw, 50, 4)
        size = emulated.library.ddetr_msda_backward_sorted_bytes(*problem)
        code = emulated.library.ddetr_msda_backward_sorted_cuda(*problem, *[None] * 8, size - 1, 0, 0, None)
        assert emulated.library.ddetr_error_string(code).decode() == "scratch memory missing or too small"


@pytest.mark.slow
def test_the_workspace_of_a_large_batch_is_that_of_some_images(emulated: CudaKernels) -> None:
    def size(batch: int) -> Any:
        value = torch.empty(batch, 22223, 8, 32, device="meta")
        problem = native.problem(value, [100, 167, 50, 84, 25, 42, 13, 21], 22223, 4)
        return emulated.library.ddetr_msda_backward_sorted_bytes(*problem)

    assert size(1) < 200 << 20
    assert size(5) == size(500)  # 2**24 samples at a time are those of five images
