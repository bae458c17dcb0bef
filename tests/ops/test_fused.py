"""The fused form of the op, by every implementation: what it adds to msda, and that it is msda besides."""

from __future__ import annotations

import math
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from ddetr_cli.errors import ShapeError
from ddetr_cli.ops import msda, msda_fused, reference

# Locations are rounded in another order than by msda: 2e-6 of a pixel, where neighbours differ by some units.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCES)
# The fused backward has two kinds of kernels: the forms of "fast" differ forward alone.
CUDA_KINDS = ("plain", "fast rows")


class Case(Protocol):
    level_hw: tuple[tuple[int, int], ...]
    batch: int
    queries: int
    heads: int
    points: int

    @property
    def flat_hw(self) -> list[int]: ...
    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[int], Tensor, Tensor]: ...


Inputs = tuple[Tensor, list[int], Tensor, Tensor]


def fused_inputs(case: Case, dtype: torch.dtype = torch.float64, numbers: int = 2) -> Inputs:
    """value, level_hw, reference, projected; points fall inside, on the border and outside."""
    generator = torch.Generator().manual_seed(2)
    real = reference.accumulate_dtype(dtype)
    levels = len(case.level_hw)
    centres = torch.rand(case.batch, case.queries, levels, 2, generator=generator, dtype=real) * 1.2 - 0.1
    sizes = torch.rand(case.batch, case.queries, levels, 2, generator=generator, dtype=real)
    points = torch.cat([centres, sizes], -1)[..., :numbers].contiguous()
    width = 3 * case.heads * levels * case.points
    projected = torch.randn(case.batch, case.queries, width, generator=generator, dtype=real) * 2
    return case.inputs(dtype)[0], case.flat_hw, points, projected


def on(device: torch.device, inputs: Inputs) -> Inputs:
    value, level_hw, points, projected = inputs
    return value.to(device), level_hw, points.to(device), projected.to(device)


def relative_error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    if result.numel() == 0:
        return 0.0
    return ((result.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1)).item()


# ---- values ----


@pytest.mark.parametrize("numbers", [2, 4], ids=["centres", "boxes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_equals_msda_of_softmax_and_locations_within_rounding(
    device: torch.device, case: Any, dtype: torch.dtype, numbers: int
) -> None:
    inputs = fused_inputs(case, dtype, numbers)
    value, level_hw, points, projected = inputs
    expected = reference.msda_fused(value.double(), level_hw, points.double(), projected.double())
    output = msda_fused(*on(device, inputs))
    assert output.dtype == dtype
    assert relative_error(output.cpu(), expected) <= TOLERANCES[dtype]


def one_query(offset: tuple[float, float], logits: list[float], numbers: list[float]) -> Inputs:
    """A map of 2 lines and 3 columns holding 1 2 3 / 10 20 30; as many points as logits, all at one place."""
    value = torch.tensor([1, 2, 3, 10, 20, 30], dtype=torch.float64).view(1, 6, 1, 1)
    projected = torch.tensor([*offset * len(logits), *logits], dtype=torch.float64).view(1, 1, -1)
    return value, [2, 3], torch.tensor(numbers, dtype=torch.float64).view(1, 1, 1, -1), projected


@pytest.mark.parametrize(
    ("offset", "numbers", "expected"),
    [
        ((0.0, 0.0), [0.5, 0.5], 11.0),  # between 2 and 20
        ((1.0, 0.5), [0.5, 0.5], 30.0),  # a pixel to the right, half a pixel down
        ((-1.5, -0.5), [0.5, 0.5], 0.5),  # on the left edge of the first line: half of 1
        ((9.0, 0.0), [0.5, 0.5], 0.0),  # outside
        ((2.0, 0.0), [0.5, 0.25, 2 / 3, 1.0], 3.0),  # half the width of the box to the right: the last column
        ((0.0, 2.0), [0.5, 0.25, 1.0, 1.0], 20.0),  # half its height down: the lower line
    ],
)
def test_a_point_lies_where_it_can_be_computed_by_hand(
    device: torch.device, offset: tuple[float, float], numbers: list[float], expected: float
) -> None:
    # an offset of as many as there are points, 2, is half the size of a box
    inputs = one_query(offset, [0.3, 0.3], numbers)
    assert msda_fused(*on(device, inputs)).item() == pytest.approx(expected, abs=1e-12)


def test_weights_are_the_softmax_of_the_logits(device: torch.device) -> None:
    value, level_hw, points, _ = one_query((0.0, 0.0), [0.0], [0.5 / 3, 0.25])
    # two points on the 1, with e^0 and e^1; one on the 30 with e^2; one outside with e^3
    offsets, logits = [0.0, 0.0, 0.0, 0.0, 2.0, 1.0, 50.0, 0.0], [0.0, 1.0, 2.0, 3.0]
    projected = torch.tensor([*offsets, *logits], dtype=torch.float64).view(1, 1, -1)
    total = sum(math.exp(x) for x in logits)
    expected = (math.exp(0) + math.exp(1) + 30 * math.exp(2)) / total
    assert msda_fused(*on(device, (value, level_hw, points, projected))).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shift", [-4096.0, -64.0, 64.0, 4096.0])
def test_large_logits_neither_overflow_nor_vanish(device: torch.device, plain: Any, shift: float) -> None:
    value, level_hw, points, projected = on(device, fused_inputs(plain, torch.float32))
    projected = (projected * 64).round() / 64  # a shift is then exact
    expected = msda_fused(value, level_hw, points, projected)
    projected[..., 2 * projected.shape[2] // 3 :] += shift
    assert relative_error(msda_fused(value, level_hw, points, projected), expected) <= 1e-6


@pytest.mark.parametrize("place", [math.nan, math.inf, -math.inf, 3e38, -1e30])
def test_an_offset_that_leads_nowhere_takes_its_weight_with_it(
    device: torch.device, plain: Any, place: float
) -> None:
    value, level_hw, points, projected = fused_inputs(plain, torch.float32)
    projected[1, 2, 5] = place
    locations, weights = reference.locate_projected(level_hw, points, projected, plain.heads)
    expected = msda(value, level_hw, locations, weights)
    output = msda_fused(*on(device, (value, level_hw, points, projected))).cpu()
    assert output.isfinite().all()
    assert relative_error(output, expected) <= 2e-5


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_a_logit_that_is_no_number_reaches_only_its_own_head(device: torch.device, plain: Any, logit: float) -> None:
    value, level_hw, points, projected = fused_inputs(plain, torch.float32)
    points[:] = 0.5
    projected[..., : 2 * projected.shape[2] // 3] = 0
    projected[1, 2, -1] = logit  # of the last head
    is_nan = msda_fused(*on(device, (value, level_hw, points, projected))).cpu().view(2, 5, 2, 8).isnan()
    assert is_nan[1, 2, 1].all()
    assert is_nan.sum() == 8


def test_a_logit_of_minus_infinity_is_a_weight_of_zero(device: torch.device, plain: Any) -> None:
    value, level_hw, points, projected = fused_inputs(plain, torch.float32)
    projected[..., -1] = -math.inf
    expected = reference.msda_fused(value, level_hw, points, projected)
    output = msda_fused(*on(device, (value, level_hw, points, projected))).cpu()
    assert relative_error(output, expected) <= 2e-5


# ---- forms of inputs ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_give_bitwise_what_contiguous_ones_give(
    device: torch.device, case: Any, dtype: torch.dtype
) -> None:
    value, level_hw, points, projected = on(device, fused_inputs(case, dtype))
    expected = msda_fused(value, level_hw, points, projected)
    head_major = value.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([value.flatten(2)] * 3, -1)
    channels = value.shape[2] * value.shape[3]
    slice_of_wide = wide[..., channels : 2 * channels].view(value.shape)
    loose = torch.cat([projected, projected], -1)[..., projected.shape[2] :]
    backwards = projected.flip(-1).contiguous().flip(-1) if projected.numel() == 0 else projected.mT.contiguous().mT
    for strided_value in (head_major, slice_of_wide):
        for strided_projected in (loose, backwards):
            assert torch.equal(msda_fused(strided_value, level_hw, points, strided_projected), expected)


def test_a_given_output_is_written_and_returned(device: torch.device, plain: Any) -> None:
    inputs = on(device, fused_inputs(plain))
    expected = msda_fused(*inputs)
    out = torch.full_like(expected, math.nan)
    assert msda_fused(*inputs, out=out) is out
    assert torch.equal(out, expected)


def test_a_batch_gives_bitwise_what_its_members_give(device: torch.device, plain: Any) -> None:
    value, level_hw, points, projected = on(device, fused_inputs(plain, torch.float32))
    together = msda_fused(value, level_hw, points, projected)
    for index in range(2):
        one = slice(index, index + 1)
        assert torch.equal(together[one], msda_fused(value[one], level_hw, points[one], projected[one]))


@pytest.mark.usefixtures("require_native")
def test_native_cpu_results_are_bitwise_the_same_whatever_the_number_of_threads(plain: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 1200, 8, 32, generator=generator)
    points, projected = torch.rand(2, 900, 1, 2, generator=generator), torch.randn(2, 900, 96, generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(msda_fused(value, [30, 40], points, projected))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- refusals ----


REFUSALS = {
    "a position too few": lambda v, hw, r, p: (v[:, :-1], hw, r, p),
    "a size missing": lambda v, hw, r, p: (v, hw[:-1], r, p),
    "reference of three numbers": lambda v, hw, r, p: (v, hw, torch.cat([r, r[..., :1]], -1), p),
    "reference of one level": lambda v, hw, r, p: (v, hw, r[:, :, :1], p),
    "projected of another width": lambda v, hw, r, p: (v, hw, r, p[..., :-1]),
    "projected of fewer queries": lambda v, hw, r, p: (v, hw, r, p[:, :-1]),
    "another batch": lambda v, hw, r, p: (v[:1], hw, r, p),
    "value without heads": lambda v, hw, r, p: (v.flatten(2), hw, r, p),
    "float32 projections for float64": lambda v, hw, r, p: (v, hw, r, p.float()),
    "half projections for half": lambda v, hw, r, p: (v.half(), hw, r.float(), p.half()),
    "integers": lambda v, hw, r, p: (v.long(), hw, r.float(), p.float()),
    "value on another device": lambda v, hw, r, p: (v.to("meta"), hw, r, p),
}


@pytest.mark.parametrize("change", REFUSALS.values(), ids=list(REFUSALS))
def test_arguments_that_do_not_fit_are_refused(device: torch.device, plain: Any, change: Any) -> None:
    with pytest.raises(ShapeError, match=r"^msda_fused: "):
        msda_fused(*change(*on(device, fused_inputs(plain))))


@pytest.mark.parametrize(
    "out", [torch.empty(2, 5, 15).double(), torch.empty(2, 5, 16), torch.empty(2, 16, 5).double().mT]
)
def test_an_output_of_another_form_is_refused(device: torch.device, plain: Any, out: Tensor) -> None:
    with pytest.raises(ShapeError, match="out"):
        msda_fused(*on(device, fused_inputs(plain)), out=out.to(device))


# ---- gradients ----


# On a CPU the gradients go by way of those of msda, whatever computes these.
OF_THEIR_OWN = [
    "reference",
    *(f"cuda-{name}" for name in CUDA_KINDS),
    *(pytest.param(f"emulated-{name}", marks=pytest.mark.slow) for name in CUDA_KINDS),
]


@pytest.mark.parametrize("device", OF_THEIR_OWN, indirect=True)
@pytest.mark.parametrize("numbers", [2, 4], ids=["centres", "boxes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_autograds_of_softmax_locations_and_msda(
    device: torch.device, case: Any, dtype: torch.dtype, numbers: int
) -> None:
    inputs = fused_inputs(case, dtype, numbers)
    wide = [t.double().clone().requires_grad_() if isinstance(t, Tensor) else t for t in inputs]
    given = [t.requires_grad_() if isinstance(t, Tensor) else t for t in on(device, inputs)]
    if numbers == 4:
        given[2].requires_grad_(False)
    result = msda_fused(*given)
    grad_output = torch.randn(result.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    result.backward(grad_output.to(device))
    wanted = reference.msda_fused(*wide)
    if wanted.requires_grad:  # not where there is nothing to sum
        wanted.backward(grad_output.double())
    for one, exact in zip((given[0], given[2], given[3]), (wide[0], wide[2], wide[3]), strict=True):
        if one.requires_grad:
            # As the output; a location beside a pixel may fall on its other side, where the slope is another.
            expected = torch.zeros_like(exact) if exact.grad is None else exact.grad
            assert relative_error(one.grad.cpu(), expected) <= 4 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_of_strided_inputs_are_those_of_contiguous_ones(
    device: torch.device, plain: Any, dtype: torch.dtype
) -> None:
    value, level_hw, points, projected = on(device, fused_inputs(plain, dtype))
    wide = torch.full((*projected.shape[:2], projected.shape[2] + 7), torch.nan, device=device, dtype=projected.dtype)
    wide[..., 3:-4] = projected
    grad_output = torch.ones(2, 5, 16, dtype=dtype, device=device)
    arguments = (level_hw, points)
    wanted = torch.ops.ddetr.msda_fused_backward(grad_output, value, *arguments, projected)
    found = torch.ops.ddetr.msda_fused_backward(
        grad_output[:, :1].expand(-1, 5, -1), value.transpose(1, 2).contiguous().transpose(1, 2), *arguments,
        wide[..., 3:-4],
    )  # fmt: skip
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2)


def test_a_constant_added_to_all_logits_of_a_head_has_no_gradient(device: torch.device, plain: Any) -> None:
    value, level_hw, points, projected = on(device, fused_inputs(plain))
    grad_output = torch.randn(2, 5, 16, dtype=torch.float64).to(device)
    _, by_projected = torch.ops.ddetr.msda_fused_backward(grad_output, value, level_hw, points, projected)
    by_logit = by_projected[..., 2 * by_projected.shape[2] // 3 :].reshape(2, 5, 2, -1)
    assert by_logit.abs().max() > 0.1
    assert by_logit.sum(-1).abs().max() <= 1e-12


def test_no_gradient_by_boxes_and_none_with_a_given_output(device: torch.device, plain: Any) -> None:
    value, level_hw, boxes, projected = on(device, fused_inputs(plain, numbers=4))
    with pytest.raises(RuntimeError, match="has no gradients by boxes"):
        msda_fused(value, level_hw, boxes.requires_grad_(), projected)
    out = value.new_empty(2, 5, 16)
    with pytest.raises(RuntimeError, match="has no gradients with out"):
        msda_fused(value.requires_grad_(), level_hw, boxes.detach(), projected, out)


@pytest.mark.parametrize("size", [(2, 5, 15), (2, 4, 16), (1, 5, 16)])
def test_a_gradient_of_another_form_is_refused(device: torch.device, plain: Any, size: tuple[int, ...]) -> None:
    inputs = on(device, fused_inputs(plain))
    with pytest.raises(ShapeError, match="msda_fused_backward: grad_output"):
        torch.ops.ddetr.msda_fused_backward(inputs[0].new_zeros(size), *inputs)


# ---- the rest of PyTorch ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_passes(device: torch.device, plain: Any, dtype: torch.dtype) -> None:
    inputs = on(device, fused_inputs(plain, dtype))
    torch.library.opcheck(torch.ops.ddetr.msda_fused.default, inputs)
    grad_output = torch.ones(2, 5, 16, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.ddetr.msda_fused_backward.default, (grad_output, *inputs))
    out = torch.zeros(2, 5, 16, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.ddetr.msda_fused.out, inputs, {"out": out})


def test_compiled_without_a_break_it_gives_the_same(device: torch.device, plain: Any) -> None:
    inputs = on(device, fused_inputs(plain, torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: msda_fused(*a).relu(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), msda_fused(*inputs).relu(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_projections_in_float32(device: torch.device, plain: Any, dtype: torch.dtype) -> None:
    value, level_hw, points, projected = on(device, fused_inputs(plain, dtype))
    with torch.autocast(device.type, dtype=dtype):
        output = msda_fused(value, level_hw, points, projected.to(dtype))
    assert torch.equal(output, msda_fused(value, level_hw, points, projected.to(dtype).float()))


def test_a_device_without_kernels_gets_shapes_from_the_reference(plain: Any) -> None:
    value, level_hw, points, projected = fused_inputs(plain, torch.float32)
    output = msda_fused(value.to("meta"), level_hw, points.to("meta"), projected.to("meta"))
    assert output.shape == (2, 5, 16)
