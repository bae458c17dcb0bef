"""What the model sees of a picture: its size by either rule, its pixels, and the padding of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.data.images import read_image
from ddetr_cli.data.pixels import MEAN, STD, network_size, pad_batch, to_pixels

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (640, 480, (800, 1066)),
        (480, 640, (1066, 800)),
        (640, 427, (800, 1199)),
        (500, 375, (800, 1066)),
        (800, 800, (800, 800)),
        (800, 1000, (1000, 800)),  # already of the right short side: unchanged
        (1333, 800, (800, 1333)),
        (1400, 800, (762, 1333)),  # over the cap, so not kept: round(1333 * 800 / 1400)
        (640, 200, (417, 1334)),  # the long side follows from the rounded 417: one over the cap
        (6000, 40, (9, 1350)),
        (1, 2000, (2000, 1)),
        (1, 2_000_000, (1333, 1)),  # the rule alone gives a side of 0
    ],
)
def test_network_size_follows_the_authors_rule(width: int, height: int, expected: tuple[int, int]) -> None:
    assert network_size(width, height, 800) == expected


def test_network_size_caps_the_long_side_in_proportion_to_the_short_side() -> None:
    assert network_size(1000, 100, 320) == (53, 530)  # cap int(320 * 1333 / 800) = 533
    assert network_size(1000, 100, 320, cap=2000) == (200, 2000)


def test_the_two_rules_differ_only_where_the_cap_binds() -> None:
    assert network_size(640, 480, 800, rule="hf") == network_size(640, 480, 800)
    assert network_size(640, 200, 800, rule="hf") == (417, 1333)


def test_the_rules_count_210_of_882_sizes_as_different() -> None:
    sizes = [(640, h) for h in range(200, 641)] + [(h, 640) for h in range(200, 641)]
    assert sum(network_size(w, h, 800) != network_size(w, h, 800, rule="hf") for w, h in sizes) == 210


def test_pixels_are_normalised_channel_first() -> None:
    pixels = to_pixels(Image.new("RGB", (4, 2), (255, 0, 51)), (2, 4))
    assert pixels.shape == (3, 2, 4)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    expected = [(value - mean) / std for value, mean, std in zip((1.0, 0.0, 0.2), MEAN, STD, strict=True)]
    assert torch.allclose(pixels[:, 1, 3], torch.tensor(expected), atol=1e-6)  # fp32 rounding


def test_pixels_of_the_published_reference_photo(data_dir: Path) -> None:
    image = read_image(data_dir / "photos/images/000000039769.png")
    pixels = to_pixels(image, network_size(*image.size, 800))
    assert pixels.shape == (3, 800, 1066)
    # Published to four digits.
    assert torch.allclose(pixels[0, 0, :3], torch.tensor([0.2796, 0.3138, 0.3481]), atol=1e-4)


def test_pixels_are_rounded_exactly_as_the_authors_transforms_round_them() -> None:
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    authors = torch.from_numpy(np.array(levels)).permute(2, 0, 1).to(torch.float32).div(255).sub(mean).div(std)
    assert torch.equal(to_pixels(levels, (16, 16)), authors)


def test_a_batch_is_padded_at_the_bottom_and_right() -> None:
    pixels, is_padding = pad_batch([torch.ones(3, 2, 5), torch.ones(3, 4, 3)])
    assert pixels.shape == (2, 3, 4, 5)
    assert pixels.sum().item() == 3 * (10 + 12)
    assert (~is_padding).sum(dim=(1, 2)).tolist() == [10, 12]
    assert not is_padding[0, :2, :5].any()
    assert not is_padding[1, :4, :3].any()


@pytest.mark.parametrize("size", [(640, 480), (427, 640), (640, 200), (210, 640), (37, 1000)])
def test_pixels_under_transformers_rule_are_those_of_its_pillow_processor(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    picture = Image.effect_mandelbrot(size, (-3, -2.5, 2, 2.5), 100).convert("RGB")
    expected = transformers.DeformableDetrImageProcessorPil()(images=[picture], return_tensors="pt")["pixel_values"][
        0
    ]
    assert torch.equal(to_pixels(picture, network_size(*size, 800, rule="hf")), expected)


@pytest.mark.parametrize("size", [(640, 480), (427, 640), (640, 200), (210, 640), (37, 1000)])
def test_pixels_differ_from_its_torchvision_processor_by_one_level_in_few_places(
    size: tuple[int, int],
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    picture = Image.effect_mandelbrot(size, (-3, -2.5, 2, 2.5), 100).convert("RGB")
    theirs = transformers.DeformableDetrImageProcessor()(images=[picture], return_tensors="pt")["pixel_values"][0]
    pixels = to_pixels(picture, network_size(*size, 800, rule="hf"))
    assert theirs.shape == pixels.shape
    levels = (theirs - pixels).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
    # torch resizes uint8 with coefficients of 16 bits, Pillow with 22: a sum close to a half is rounded otherwise.
    assert levels.max() < 1.01
    assert (levels > 0.5).float().mean() < 0.005
