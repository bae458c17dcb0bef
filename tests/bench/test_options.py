"""What the user may ask to be measured."""

from __future__ import annotations

import pytest

from ddetr_cli.bench.options import parse_precisions, parse_size, split_names
from ddetr_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size_hw"),
    [
        ("800", (800, 1066)),
        ("320", (320, 426)),
        ("800x1066", (800, 1066)),
        ("1066X800", (1066, 800)),
        ("32x64", (32, 64)),
    ],
)
def test_a_size_is_height_by_width_or_the_short_side_of_a_4_to_3_picture(text: str, size_hw: tuple[int, int]) -> None:
    assert parse_size(text) == size_hw


def test_a_single_number_gives_the_size_the_detector_would_use_for_a_640x480_photo() -> None:
    from ddetr_cli.data.pixels import network_size

    for short in (320, 480, 608, 800):
        assert parse_size(str(short)) == network_size(640, 480, short)


@pytest.mark.parametrize(
    "text", ["", "0", "31", "800x", "x800", "-800", "8.5", "800x1066x3", "9000", "1x99999", "nan", "²"]
)
def test_a_size_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--image-size"):
        parse_size(text)


def test_models_come_with_commas_or_repeated_and_are_measured_once_each() -> None:
    assert split_names(["r50, tiny", "tiny", "r50-refine,"], "--models", "r50") == ("r50", "tiny", "r50-refine")


@pytest.mark.parametrize("values", [[], [""], [" , "]])
def test_naming_no_model_is_refused(values: list[str]) -> None:
    with pytest.raises(UsageError, match="--models"):
        split_names(values, "--models", "r50")


def test_precisions_come_with_commas() -> None:
    assert parse_precisions("fp32, bf16,fp32") == ("fp32", "bf16")


@pytest.mark.parametrize("text", ["", ",", "fp8", "fp32,int8", "fp32 bf16"])
def test_an_unknown_precision_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--precision"):
        parse_precisions(text)
