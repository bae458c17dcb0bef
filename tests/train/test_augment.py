from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.train import augment as module
from ddetr_cli.train.augment import Sample, augment, augmented_size, crop, resize


def _sample(width: int = 200, height: int = 120) -> Sample:
    """A black picture with one white rectangle, whose box is therefore known from the pixels."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (60, 30, 120, 90))
    return Sample(image, np.array([[60.0, 30.0, 120.0, 90.0]]), np.array([5]))


def _white_box(image: Image.Image) -> tuple[float, float, float, float]:
    # Colour jitter moves all levels; the fill stays below two thirds of the rectangle's.
    levels = np.asarray(image.convert("L")).astype(float)
    mask = levels > 0.8 * levels.max()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


@pytest.mark.parametrize("name", ["paper", "jitter", "top-down"])
def test_boxes_travel_with_the_picture(name: str) -> None:
    checked = 0
    for seed in range(60):
        found = augment(_sample(), name, 96, np.random.default_rng(seed))  # type: ignore[arg-type]
        if not len(found.labels):
            continue
        checked += 1
        assert found.labels.tolist() == [5]
        # Two pixels: antialiasing softens an edge by about one, rounding moves it by less than one.
        assert found.boxes_xyxy_px[0] == pytest.approx(_white_box(found.image), abs=2.0)
    assert checked >= 30


@pytest.mark.parametrize("name", ["jitter", "top-down"])
def test_jitter_keeps_the_frame_the_network_will_see(name: str) -> None:
    for seed in range(20):
        found = augment(_sample(), name, 96, np.random.default_rng(seed))  # type: ignore[arg-type]
        # 200x120 at short side 96; the cap of the long side, 159, binds: 159/200 of 120 is 95.4.
        assert found.image.size == (158, 95)


@pytest.mark.parametrize("name", ["paper", "jitter", "top-down"])
def test_the_size_of_a_variation_is_known_without_the_picture(name: str) -> None:
    for seed in range(40):
        width, height = (200, 120) if seed % 2 else (70, 260)
        found = augment(_sample(width, height), name, 96, np.random.default_rng(seed))  # type: ignore[arg-type]
        expected = augmented_size(width, height, name, 96, np.random.default_rng(seed))  # type: ignore[arg-type]
        assert found.image.size == expected[::-1]


def test_paper_sizes_are_the_authors_at_800(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(sample: Sample, size_hw: tuple[int, int]) -> Sample:  # the sizes are what counts here
        return replace(sample, image=Image.new("RGB", size_hw[::-1]))

    monkeypatch.setattr(module, "resize", empty)
    shorts = set()
    for seed in range(200):
        found = augment(_sample(640, 480), "paper", 800, np.random.default_rng(seed))
        shorts.add(min(found.image.size))
        assert max(found.image.size) <= 1334
    # Crops are at most 600 x 384: none is long enough for the cap of the long side to make the short one smaller.
    assert shorts == set(range(480, 801, 32))


def test_paper_crops_are_the_authors_range_with_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []

    def recorded(sample: Sample, left: int, top: int, width: int, height: int) -> Sample:
        assert 0 <= left <= sample.image.width - width and 0 <= top <= sample.image.height - height
        assert (width <= sample.image.width) and (height <= sample.image.height)
        sides.extend((width, height))
        return crop(sample, left, top, width, height)

    monkeypatch.setattr(module, "crop", recorded)
    for seed in range(600):
        augment(_sample(64, 48), "paper", 80, np.random.default_rng(seed))
    # 384 to 600 px at 800 are 38 to 60 at 80; the short side can be as small as 40.
    assert set(sides) == set(range(38, 61))
    assert 500 < len(sides) < 700  # half of the samples


def test_the_same_seed_gives_the_same_sample() -> None:
    first, second = (augment(_sample(), "top-down", 96, np.random.default_rng(7)) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert np.array_equal(first.boxes_xyxy_px, second.boxes_xyxy_px)


def test_a_crop_clips_what_it_cuts_and_drops_what_it_loses() -> None:
    sample = Sample(
        Image.new("RGB", (100, 100)),
        np.array([[10.0, 10.0, 50.0, 50.0], [60.0, 60.0, 90.0, 90.0]]),
        np.array([1, 2]),
    )
    found = crop(sample, 30, 20, 20, 40)
    assert found.boxes_xyxy_px.tolist() == [[0.0, 0.0, 20.0, 30.0]]
    assert found.labels.tolist() == [1]
    # 20x30 of 40x40 stay: 37.5 %.
    assert len(crop(sample, 30, 20, 20, 40, min_visible=0.4).labels) == 0


def test_resizing_scales_each_axis() -> None:
    found = resize(_sample(200, 120), (60, 400))
    assert found.image.size == (400, 60)
    assert found.boxes_xyxy_px.tolist() == [[120.0, 15.0, 240.0, 45.0]]
