"""The op as PyTorch sees it, by every implementation: values, gradients, odd inputs, refusals, tracing."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor

from ddetr_cli.errors import ShapeError
from ddetr_cli.ops import msda, reference

# Of sums of up to 40 x 4 products of order 1. The 16-bit ones are those of one rounding of the result.
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCES)


class Case(Protocol):
    @property
    def flat_hw(self) -> list[int]: ...
    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[int], Tensor, Tensor]: ...


Inputs = tuple[Tensor, list[int], Tensor, Tensor]


def on(device: torch.device, inputs: Inputs, *, requires_grad: bool = False) -> Inputs:
    value, level_hw, xy, weights = inputs
    value, xy, weights = (t.detach().clone().to(device).requires_grad_(requires_grad) for t in (value, xy, weights))
    return value, level_hw, xy, weights


def gradients(inputs: Inputs, grad_output: Tensor) -> list[Tensor]:
    value, level_hw, xy, weights = inputs
    output = msda(value, level_hw, xy, weights)
    return [g.cpu() for g in torch.autograd.grad(output, (value, xy, weights), grad_output.to(output))]


def relative_error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    if result.numel() == 0:
        return 0.0
    return ((result.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1)).item()


# ---- values ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_equals_the_float64_reference_within_rounding(
    device: torch.device, case: Case, dtype: torch.dtype
) -> None:
    inputs = case.inputs(dtype)
    value, level_hw, xy, weights = inputs
    # the inputs as rounded to their dtypes, taken to float64: only the arithmetic is compared
    expected = reference.msda_forward(value.double(), level_hw, xy.double(), weights.double())
    output = msda(*on(device, inputs))
    assert output.dtype == dtype
    assert relative_error(output.cpu(), expected) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_the_float64_reference_within_rounding(
    device: torch.device, case: Case, dtype: torch.dtype
) -> None:
    inputs = case.inputs(dtype)
    value, level_hw, xy, weights = inputs
    output_shape = (value.shape[0], xy.shape[1], value.shape[2] * value.shape[3])
    grad_output = torch.randn(output_shape, generator=torch.Generator().manual_seed(1), dtype=xy.dtype).to(dtype)
    expected = reference.msda_backward(grad_output.double(), value.double(), level_hw, xy.double(), weights.double())
    computed = gradients(on(device, inputs, requires_grad=True), grad_output)
    # Gradients of locations and weights stay in the dtype of the sums; they add up to 3096 channels.
    exact = 1e-12 if dtype == torch.float64 else 2e-5
    for result, wanted, tolerance in zip(computed, expected, (TOLERANCES[dtype] * 4, exact, exact), strict=True):
        assert relative_error(result, wanted) <= tolerance


def test_gradients_pass_gradcheck_in_float64(device: torch.device, case: Case) -> None:
    value, level_hw, xy, weights = on(device, case.inputs(), requires_grad=True)
    is_exact = device.type == "cpu"  # on CUDA additions come in any order

    def op(value: Tensor, xy: Tensor, weights: Tensor) -> Tensor:
        return msda(value, level_hw, xy, weights)

    if value.numel() == 0 or xy.numel() == 0:
        op(value, xy, weights).sum().backward()
        assert all(tensor.grad is not None and not tensor.grad.any() for tensor in (value, xy, weights))
        return
    assert torch.autograd.gradcheck(op, (value, xy, weights), fast_mode=True, nondet_tol=0 if is_exact else 1e-10)


def test_the_numbers_of_the_authors_code_are_reproduced(device: torch.device, repository: Path) -> None:
    with np.load(repository / "tests/golden/op.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    inputs = (golden["value"], golden["level_hw"].flatten().tolist(), golden["sampling_xy"], golden["weights"])
    inputs = on(device, inputs, requires_grad=True)
    torch.testing.assert_close(msda(*inputs).cpu(), golden["output"], rtol=0, atol=1e-9)
    names = ("grad_value", "grad_sampling_xy", "grad_weights")
    for name, result in zip(names, gradients(inputs, golden["grad_output"]), strict=True):
        torch.testing.assert_close(result, golden[name], rtol=0, atol=1e-9)


def one_point(x: float, y: float, *, weight: float = 1.0, dtype: torch.dtype = torch.float64) -> Inputs:
    """A map of 2 lines and 3 columns holding 1 2 3 / 10 20 30, and one point."""
    value = torch.tensor([1, 2, 3, 10, 20, 30], dtype=dtype).view(1, 6, 1, 1)
    real = reference.accumulate_dtype(dtype)
    xy, weights = torch.tensor([x, y], dtype=real), torch.tensor([weight], dtype=real)
    return value, [2, 3], xy.view(1, 1, 1, 1, 1, 2), weights.view(1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.5 / 3, 0.25, 1.0),  # centre of the first pixel
        (2.5 / 3, 0.75, 30.0),  # centre of the last
        (0.5, 0.5, 11.0),  # between 2 and 20
        (1 / 3, 0.25, 1.5),  # between 1 and 2
        (0.0, 0.25, 0.5),  # the left edge: half of 1, half outside
        (0.0, 0.0, 0.25),  # the corner: a quarter of 1
        (1.0, 1.0, 7.5),  # the other corner: a quarter of 30
        (0.5, 1.0, 10.0),  # the lower edge: half of 20
        (-0.5 / 3, 0.25, 0.0),  # the first place that is wholly outside
        (3.5 / 3, 0.25, 0.0),
        (0.5, 1.25, 0.0),
        (-7.0, 0.5, 0.0),
    ],
)
def test_a_point_reads_what_can_be_computed_by_hand(
    device: torch.device, x: float, y: float, expected: float
) -> None:
    assert msda(*on(device, one_point(x, y, weight=2.0))).item() == pytest.approx(2 * expected, abs=1e-12)


def test_gradients_of_a_point_are_those_computed_by_hand(device: torch.device) -> None:
    # a quarter of the way from 2 to 3 and from the first line to the second: 2.25 above, 22.5 below
    inputs = on(device, one_point(1.75 / 3, 0.375, weight=2.0), requires_grad=True)
    grad_value, grad_xy, grad_weights = gradients(inputs, torch.ones(1, 1, 1, dtype=torch.float64))
    assert grad_value.flatten().tolist() == pytest.approx([0, 2 * 9 / 16, 2 * 3 / 16, 0, 2 * 3 / 16, 2 / 16])
    by_x, by_y = 0.75 * 1 + 0.25 * 10, 22.5 - 2.25  # per pixel
    assert grad_xy.flatten().tolist() == pytest.approx([2 * 3 * by_x, 2 * 2 * by_y])
    assert grad_weights.item() == pytest.approx(0.75 * 2.25 + 0.25 * 22.5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_points_on_pixels_and_borders_agree_with_the_reference(
    device: torch.device, dtype: torch.dtype, tolerance: float
) -> None:
    height, width, beyond = 5, 7, 1e-3
    marks = [
        [0, 1, 0.5 / n, 1 - 0.5 / n, -0.5 / n, 1 + 0.5 / n, -0.5 / n - beyond, 1 + 0.5 / n + beyond, 1 / n]
        + [(k + 0.5) / n for k in range(n)]
        for n in (width, height)
    ]
    grid = torch.cartesian_prod(*(torch.tensor(m, dtype=dtype) for m in marks))
    value = torch.linspace(-1, 1, 2 * height * width * 3, dtype=dtype).view(1, height * width, 2, 3)
    xy = grid.view(1, -1, 1, 1, 1, 2).expand(1, -1, 2, 1, 1, 2)
    inputs = (value, [height, width], xy, torch.ones(xy.shape[:-1], dtype=dtype))
    grad_output = torch.ones(1, len(grid), 6, dtype=dtype)
    output = msda(*on(device, inputs)).cpu()
    # also where the derivative jumps: every implementation rounds x * width - 0.5 alike
    computed = gradients(on(device, inputs, requires_grad=True), grad_output)
    expected = [reference.msda_forward(*inputs), *reference.msda_backward(grad_output, *inputs)]
    for result, wanted in zip([output, *computed], expected, strict=True):
        assert relative_error(result, wanted) <= tolerance


# ---- values that are not numbers ----

NOT_PLACES = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e9, -1e30]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("place", NOT_PLACES)
def test_a_location_that_is_no_place_contributes_nothing_and_gets_no_gradient(
    device: torch.device, plain: Case, place: float, axis: int, dtype: torch.dtype
) -> None:
    value, level_hw, xy, weights = plain.inputs(dtype)
    xy[1, 2, 0, 1, 3, axis] = place
    weights[1, 2, 0, 1, 3] = math.nan  # not even this may matter
    computed = on(device, (value, level_hw, xy, weights), requires_grad=True)
    output = msda(*computed)
    grad_output = torch.ones_like(output)
    grads = gradients(computed, grad_output)

    xy[1, 2, 0, 1, 3], weights[1, 2, 0, 1, 3] = 0.5, 0.0
    without = on(device, (value, level_hw, xy, weights), requires_grad=True)
    assert torch.equal(output, msda(*without))
    expected = gradients(without, grad_output)
    assert not grads[1][1, 2, 0, 1, 3].any()
    assert not grads[2][1, 2, 0, 1, 3].any()
    for result, wanted in zip(grads, expected, strict=True):
        result, wanted = result.clone(), wanted.clone()
        if result.dim() != 4:
            wanted[1, 2, 0, 1, 3] = 0
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6)


def test_a_nan_in_value_reaches_only_the_outputs_that_read_it(device: torch.device) -> None:
    value = torch.ones(1, 9, 2, 3, dtype=torch.float64)
    value[0, 4, 1, 2] = math.nan  # the middle of 3 x 3; second head, third channel
    corners = torch.tensor([[0.5, 0.5], [0.1, 0.1], [-0.1, 0.5], [0.5, 1.5]], dtype=torch.float64)
    xy = corners.view(1, 4, 1, 1, 1, 2).repeat(1, 1, 2, 1, 1, 1)
    weights = torch.ones(1, 4, 2, 1, 1, dtype=torch.float64)
    is_nan = msda(*on(device, (value, [3, 3], xy, weights))).cpu().isnan()
    assert is_nan.nonzero().tolist() == [[0, 0, 5]]


def test_a_nan_in_the_first_pixel_does_not_leak_into_points_beside_the_map(device: torch.device) -> None:
    value = torch.full((1, 4, 1, 1), math.nan, dtype=torch.float64)
    value[0, 3] = 1.0
    # half outside on the right of the last line: its inner neighbour is the last pixel alone
    xy = torch.tensor([1.0, 1.0], dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
    inputs = on(device, (value, [2, 2], xy, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)), requires_grad=True)
    assert msda(*inputs).item() == 0.25
    assert all(grad.isfinite().all() for grad in gradients(inputs, torch.ones(1, 1, 1)))


def test_a_nan_weight_reaches_only_its_own_output(device: torch.device, plain: Case) -> None:
    value, level_hw, xy, weights = plain.inputs()
    xy[0, 1, 0, 0, 0] = 0.5
    weights[0, 1, 0, 0, 0] = math.nan
    is_nan = msda(*on(device, (value, level_hw, xy, weights))).cpu().view(2, 5, 2, 8).isnan()
    assert is_nan[0, 1, 0].all()
    assert is_nan.sum() == 8


# ---- forms of inputs ----


def strided(tensor: Tensor) -> Tensor:
    """The same numbers in a storage with gaps and an offset, dimensions stored in reverse."""
    wide = torch.full([*reversed(tensor.shape)], math.nan, dtype=tensor.dtype, device=tensor.device)
    wide = torch.stack([wide, wide, wide], dim=-1)[..., 1]
    wide = wide.permute(*reversed(range(tensor.dim())))
    return wide.copy_(tensor)


def test_inputs_and_gradients_that_are_not_contiguous_give_the_same_numbers(
    device: torch.device, plain: Case
) -> None:
    value, level_hw, xy, weights = on(device, plain.inputs())
    loose = (strided(value), level_hw, strided(xy), strided(weights))
    assert not loose[0].is_contiguous()
    assert torch.equal(msda(*loose), msda(value, level_hw, xy, weights))
    grad_output = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = gradients(on(device, (value, level_hw, xy, weights), requires_grad=True), grad_output)
    leaves = [tensor.requires_grad_() for tensor in (loose[0], loose[2], loose[3])]
    output = msda(leaves[0], level_hw, leaves[1], leaves[2])
    results = torch.autograd.grad(output, leaves, strided(grad_output.to(device)))
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), wanted, rtol=1e-12, atol=1e-12)


def test_an_expanded_gradient_is_read_right(device: torch.device, plain: Case) -> None:
    inputs = on(device, plain.inputs(), requires_grad=True)
    output = msda(*inputs)
    output.sum().backward()  # its gradient is one number, expanded
    expected = gradients(inputs, torch.ones_like(output))
    assert inputs[0].grad is not None
    torch.testing.assert_close(inputs[0].grad.cpu(), expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_gradient_may_be_asked_of_one_input_alone(device: torch.device, plain: Case, wanted: int) -> None:
    value, level_hw, xy, weights = on(device, plain.inputs())
    expected = gradients(on(device, plain.inputs(), requires_grad=True), torch.ones(2, 5, 16))
    tensors = [value, xy, weights]
    tensors[wanted].requires_grad_()
    msda(tensors[0], level_hw, tensors[1], tensors[2]).sum().backward()
    for index, tensor in enumerate(tensors):
        if index == wanted:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad.cpu(), expected[wanted], rtol=1e-12, atol=1e-12)
        else:
            assert tensor.grad is None


# ---- repeatability ----


def test_a_batch_gives_bitwise_what_its_members_give(device: torch.device, plain: Case) -> None:
    value, level_hw, xy, weights = on(device, plain.inputs(torch.float32))
    together = msda(value, level_hw, xy, weights)
    for index in range(2):
        one = slice(index, index + 1)
        assert torch.equal(together[one], msda(value[one], level_hw, xy[one], weights[one]))


@pytest.mark.usefixtures("require_native")
def test_native_cpu_results_are_bitwise_the_same_whatever_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 1200, 8, 32, generator=generator)
    xy, weights = (
        torch.rand(2, 900, 8, 1, 4, 2, generator=generator),
        torch.rand(2, 900, 8, 1, 4, generator=generator),
    )
    grad_output = torch.randn(2, 900, 256, generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 1):
            torch.set_num_threads(count)
            inputs = on(torch.device("cpu"), (value, [30, 40], xy, weights), requires_grad=True)
            results.append([msda(*inputs), *gradients(inputs, grad_output)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_threads_may_call_at_once(device: torch.device, plain: Case) -> None:
    inputs = on(device, plain.inputs(), requires_grad=True)
    expected = msda(*inputs)
    grad_expected = gradients(inputs, torch.ones_like(expected))
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(5):
            if not torch.equal(msda(*inputs), expected):
                wrong.append("output")
            for result, wanted in zip(gradients(inputs, torch.ones_like(expected)), grad_expected, strict=True):
                if not torch.allclose(result, wanted, rtol=1e-12, atol=1e-12):
                    wrong.append("gradient")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- refusals ----


def shapes_that_do_not_fit() -> dict[str, Any]:
    def change(**changes: Any) -> Any:
        def build(inputs: Inputs) -> Inputs:
            value, level_hw, xy, weights = inputs
            return (
                changes.get("value", lambda v: v)(value),
                changes.get("level_hw", lambda hw: hw)(level_hw),
                changes.get("xy", lambda x: x)(xy),
                changes.get("weights", lambda w: w)(weights),
            )

        return build

    return {
        "a position too few": change(value=lambda v: v[:, :-1]),
        "a level one line higher": change(level_hw=lambda hw: [hw[0] + 1, *hw[1:]]),
        "a height of 0": change(level_hw=lambda hw: [0, *hw[1:]]),
        "negative sizes of the right product": change(level_hw=lambda hw: [-hw[0], -hw[1], *hw[2:]]),
        "a size missing": change(level_hw=lambda hw: hw[:-1]),
        "a level missing": change(level_hw=lambda hw: hw[:2]),
        "weights of another number of queries": change(weights=lambda w: w[:, :-1]),
        "locations of another number of points": change(xy=lambda x: x[:, :, :, :, :-1]),
        "locations of three coordinates": change(xy=lambda x: torch.cat([x, x[..., :1]], -1)),
        "another number of heads": change(value=lambda v: v[:, :, :1]),
        "another batch": change(value=lambda v: v[:1]),
        "value without heads": change(value=lambda v: v.flatten(2)),
        "float32 locations for float64": change(xy=lambda x: x.float()),
        "float32 weights for float64": change(weights=lambda w: w.float()),
        "half locations for half": change(
            value=lambda v: v.half(), xy=lambda x: x.half(), weights=lambda w: w.half()
        ),
        "integers": change(value=lambda v: v.long(), xy=lambda x: x.float(), weights=lambda w: w.float()),
        "complex numbers": change(value=lambda v: v.to(torch.complex64), xy=lambda x: x.float()),
        "value on another device": change(value=lambda v: v.to("meta")),
    }


@pytest.mark.parametrize(("name", "change"), shapes_that_do_not_fit().items(), ids=list(shapes_that_do_not_fit()))
def test_arguments_that_do_not_fit_are_refused(device: torch.device, plain: Case, name: str, change: Any) -> None:
    del name
    with pytest.raises(ShapeError, match=r"^msda: "):
        msda(*change(on(device, plain.inputs())))


def test_a_gradient_of_the_wrong_shape_is_refused(device: torch.device, plain: Case) -> None:
    inputs = on(device, plain.inputs())
    with pytest.raises(ShapeError, match="grad_output"):
        torch.ops.ddetr.msda_backward(torch.ones(2, 5, 15, dtype=torch.float64, device=device), *inputs)


def test_second_derivatives_are_refused_in_words(device: torch.device, plain: Case) -> None:
    inputs = on(device, plain.inputs(), requires_grad=True)
    (first,) = torch.autograd.grad(msda(*inputs).sum(), inputs[3], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()


def test_a_value_changed_before_the_backward_pass_is_noticed(device: torch.device, plain: Case) -> None:
    value, level_hw, xy, weights = on(device, plain.inputs())
    weights.requires_grad_()
    output = msda(value, level_hw, xy, weights)
    value += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_value_freed_before_the_backward_pass_is_kept_alive(device: torch.device, plain: Case) -> None:
    inputs = on(device, plain.inputs(), requires_grad=True)
    expected = gradients(inputs, torch.ones(2, 5, 16))
    value, level_hw, xy, weights = inputs
    output = msda(value * 1, level_hw, xy, weights)
    (grad,) = torch.autograd.grad(output, xy, torch.ones_like(output))
    torch.testing.assert_close(grad.cpu(), expected[1], rtol=1e-12, atol=1e-12)


# ---- the rest of PyTorch ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_passes(device: torch.device, plain: Case, dtype: torch.dtype) -> None:
    inputs = on(device, plain.inputs(dtype), requires_grad=True)
    torch.library.opcheck(torch.ops.ddetr.msda, inputs)
    detached = on(device, plain.inputs(dtype))
    grad_output = torch.ones(2, 5, 16, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.ddetr.msda_backward, (grad_output, *detached))


def test_compiled_without_a_break_it_gives_the_same(device: torch.device, plain: Case) -> None:
    inputs = on(device, plain.inputs(torch.float32), requires_grad=True)

    def layer(value: Tensor, level_hw: list[int], xy: Tensor, weights: Tensor) -> Tensor:
        return msda(value * 2, level_hw, xy, weights.softmax(-1)).relu()

    torch._dynamo.reset()
    # aot_eager traces forward and backward as inductor does, without needing a compiler on this machine
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output, expected = compiled(*inputs), layer(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    grad = torch.autograd.grad(output.sum(), inputs[2])[0]
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), inputs[2])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_it_without_a_break(device: torch.device, plain: Case) -> None:
    inputs = on(device, plain.inputs(torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: msda(*a) * 2, fullgraph=True)
    try:
        output = compiled(*inputs)
    except torch._inductor.exc.InductorError as error:
        if "compiler" in str(error).lower():
            pytest.skip(f"inductor found no C++ compiler: {error}")
        raise
    torch.testing.assert_close(output, msda(*inputs) * 2, rtol=1e-6, atol=1e-6)


def test_exported_with_a_free_batch_and_number_of_queries_it_gives_the_same(
    device: torch.device, plain: Case
) -> None:
    class Layer(torch.nn.Module):
        def forward(self, value: Tensor, xy: Tensor, weights: Tensor) -> Tensor:
            return msda(value, [6, 4, 3, 5], xy, weights)

    value, _, xy, weights = on(device, plain.inputs(torch.float32))
    batch, queries = torch.export.Dim("batch"), torch.export.Dim("queries")
    free = ({0: batch}, {0: batch, 1: queries}, {0: batch, 1: queries})
    program = torch.export.export(Layer(), (value, xy, weights), dynamic_shapes=free)
    assert any("ddetr.msda" in str(node.target) for node in program.graph.nodes)
    value, xy, weights = (
        value.repeat(3, 1, 1, 1),
        xy[:, :4].repeat(3, 1, 1, 1, 1, 1),
        weights[:, :4].repeat(3, 1, 1, 1, 1),
    )
    expected = msda(value, plain.flat_hw, xy, weights)
    assert torch.equal(program.module()(value, xy, weights), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_locations_and_weights_in_float32(
    device: torch.device, plain: Case, dtype: torch.dtype
) -> None:
    value, level_hw, xy, weights = on(device, plain.inputs(dtype))
    low = weights.to(dtype)
    with torch.autocast(device.type, dtype=dtype):
        output = msda(value, level_hw, xy, low)
        unchanged = msda(value.float(), level_hw, xy, weights)
    assert output.dtype == dtype
    assert torch.equal(output, msda(value, level_hw, xy, low.float()))
    assert unchanged.dtype == torch.float32


def test_inference_mode_gives_the_same(device: torch.device, plain: Case) -> None:
    expected = msda(*on(device, plain.inputs()))
    with torch.inference_mode():
        assert torch.equal(msda(*on(device, plain.inputs())), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap loops where an op has no rule for it
def test_vmap_gives_what_a_loop_gives(device: torch.device, plain: Case) -> None:
    value, level_hw, xy, weights = on(device, plain.inputs())
    values = torch.stack([value, value + 1])
    expected = torch.stack([msda(v, level_hw, xy, weights) for v in values])
    assert torch.equal(torch.func.vmap(lambda v: msda(v, level_hw, xy, weights))(values), expected)


def test_a_device_without_kernels_gets_shapes_from_the_reference(plain: Case) -> None:
    value, level_hw, xy, weights = plain.inputs(torch.float32)
    output = msda(value.to("meta"), level_hw, xy.to("meta"), weights.to("meta"))
    assert output.shape == (2, 5, 16)
    assert output.device.type == "meta"
