"""How time grows with the picture, and the exponent of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from ddetr_cli.bench.options import SCALING, BenchOptions
from ddetr_cli.bench.run import run_bench
from ddetr_cli.bench.scaling import (
    AREA,
    AREA_SHARES,
    LEVELS,
    QUERIES,
    Curve,
    Point,
    ScalingSection,
    fit_exponent,
    scaled_sizes,
)
from ddetr_cli.bench.timing import Samples
from ddetr_cli.errors import UsageError
from ddetr_cli.presets import PRESETS


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(exponent: float) -> None:
    values = [1.0, 2.0, 5.0, 9.0]
    found = fit_exponent(values, [3 * value**exponent for value in values])
    assert found.value == pytest.approx(exponent)
    assert found.error == pytest.approx(0, abs=1e-7)


def test_the_error_is_that_of_a_straight_line_by_least_squares() -> None:
    # ln x = 0, 1, 2 and ln y = 0, 2, 2: slope 1, residuals -1/3, 2/3, -1/3, so sqrt((6/9) / 1 / 2).
    found = fit_exponent([1, math.e, math.e**2], [1, math.e**2, math.e**2])
    assert found.value == pytest.approx(1)
    assert found.error == pytest.approx(math.sqrt(1 / 3))


def test_two_points_have_an_exponent_without_an_error() -> None:
    assert fit_exponent([1, 2], [5, 10]).error is None
    assert str(fit_exponent([1, 2], [5, 10])) == "1.00"


def test_sizes_scale_the_area_and_leave_no_rest_in_any_map() -> None:
    sizes = scaled_sizes((800, 1066))
    assert len(sizes) == len(AREA_SHARES)
    assert all(side % 64 == 0 for size in sizes for side in size)
    for (height, width), share in zip(sizes, AREA_SHARES, strict=True):
        assert height * width == pytest.approx(share * 800 * 1066, rel=0.15)


def test_a_picture_too_small_to_scale_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--image-size 64x64: too small to scale down\. Give 256 or more\.$"):
        scaled_sizes((64, 64))


def test_time_of_the_largest_two_is_looked_at_on_its_own() -> None:
    points = tuple(Point(value, Samples((time,)), 1) for value, time in ((1, 1.0), (2, 1.0), (4, 4.0)))
    curve = Curve("m", "fp32", AREA, points)
    assert curve.last_exponent.value == pytest.approx(2)
    assert curve.time_exponent.value == pytest.approx(1)
    assert curve.flops_exponent.value == 0


@pytest.fixture
def one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tiny`` and a ``small`` of one stage."""
    small = replace(PRESETS["tiny"], preset="small", two_stage=False, encoder_layers=1, decoder_layers=1)
    monkeypatch.setitem(PRESETS, "small", small)
    monkeypatch.setattr("ddetr_cli.bench.scaling.AREA_SHARES", (1 / 4, 1.0))
    monkeypatch.setattr("ddetr_cli.bench.scaling.QUERY_COUNTS", (10, 20))


@pytest.mark.usefixtures("one_stage")
def test_models_are_measured_over_area_queries_and_levels() -> None:
    options = BenchOptions(
        ("small", "tiny"), size_hw=(128, 128), precisions=("fp32",), device="cpu", rounds=1, warmup=1,
        measurements=(SCALING,),
    )  # fmt: skip
    (section,) = run_bench(options).sections
    assert isinstance(section, ScalingSection)
    # The queries of a two-stage model are its proposals: there is nothing to choose.
    assert [(curve.model, curve.quantity, [point.value for point in curve.points]) for curve in section.curves] == [
        ("small", AREA, [64 * 64, 128 * 128]),
        ("tiny", AREA, [64 * 64, 128 * 128]),
        ("small", QUERIES, [10, 20]),
        ("small", LEVELS, [1, 3, 4]),
    ]
    for curve in section.curves:
        flops = [point.flops for point in curve.points]
        assert flops == sorted(set(flops)), curve.quantity
    document = json.loads(json.dumps(section.to_json(), allow_nan=False))
    assert document[0]["points"][0]["pixels"] == 4096
    points, exponents = section.tables()
    assert len(points.rows) == 2 + 2 + 2 + 3
    assert [row[0] for row in exponents.rows] == ["small", "tiny"]
