from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.functional import to_tensor

from ddetr_cli.data.pixels import to_pixels
from ddetr_cli.errors import UsageError
from ddetr_cli.inference.preparation import Preparation
from ddetr_cli.inference.tiles import Tiling
from ddetr_cli.presets import DEFORMABLE_DETR, DETR, FASTER_RCNN


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("family", [DEFORMABLE_DETR, DETR])
def test_the_detr_families_see_the_resized_normalised_picture(family: str):
    picture = noise(90, 60)
    prepared = Preparation(family, 64)(picture)
    assert prepared.size_hw == (60, 90)
    assert torch.equal(prepared.pixels, to_pixels(picture, (64, 96)))


def test_large_jpegs_may_be_reduced_but_not_for_tiles_nor_for_faster_rcnn() -> None:
    assert Preparation(DEFORMABLE_DETR, 64).reducible_to == 64
    assert Preparation(DEFORMABLE_DETR, 64, tiles=Tiling(128)).reducible_to is None
    assert Preparation(FASTER_RCNN, 64).reducible_to is None


def test_the_size_rules_of_the_authors_and_of_transformers_differ_by_a_pixel_or_two():
    # The cap binds: 1333 * 231 / 640 = 481.1, rounded to 481; of which 481 * 640 / 231 = 1332.6 is the long side.
    # transformers takes it of the unrounded 481.1.
    picture = noise(640, 231)
    original, hf = (Preparation(DETR, 800, rule)(picture).pixels.shape for rule in ("original", "hf"))
    assert original == (3, 481, 1332)
    assert hf == (3, 481, 1333)


def test_faster_rcnn_sees_what_torchvisions_own_transform_makes():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    transform = GeneralizedRCNNTransform(800, 1333, mean, std).eval()
    for width, height in [(640, 480), (500, 333), (481, 321), (300, 1200), (799, 801), (53, 47)]:
        picture = noise(width, height)
        images, _ = transform([to_tensor(picture)])
        (size_hw,) = images.image_sizes
        prepared = Preparation(FASTER_RCNN, 800)(picture)
        assert prepared.size_hw == (height, width)
        assert tuple(prepared.pixels.shape[1:]) == tuple(size_hw)
        # The same operations; interpolation may add its four products in another order.
        expected = images.tensors[0, :, : size_hw[0], : size_hw[1]]
        torch.testing.assert_close(prepared.pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2000, 1), (1, 2000), (3, 5000)])
def test_a_picture_of_any_shape_keeps_at_least_one_pixel(size: tuple[int, int]):
    for family in (DEFORMABLE_DETR, FASTER_RCNN):
        pixels = Preparation(family, 64)(Image.new("RGB", size, "grey")).pixels
        assert min(pixels.shape) >= 1
        assert max(pixels.shape) <= 107
        assert bool(pixels.isfinite().all())


@pytest.mark.parametrize("family", [DEFORMABLE_DETR, FASTER_RCNN])
def test_threads_prepare_what_one_thread_does(family: str):
    pictures = [noise(120, 80, seed) for seed in range(16)]
    prepare = Preparation(family, 64)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(prepare, pictures))
    for picture, prepared in zip(pictures, together, strict=True):
        assert torch.equal(prepare(picture).pixels, prepared.pixels)


def test_an_unknown_rule_is_refused_and_so_is_transformers_rule_for_faster_rcnn():
    with pytest.raises(UsageError, match=r"^preprocess 'pil': unknown\. Choose original or hf\.$"):
        Preparation(DETR, 800, "pil")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^preprocess 'hf': not for Faster R-CNN .* Leave it out\.$"):
        Preparation(FASTER_RCNN, 800, "hf")
