from __future__ import annotations

import math

import torch

from ddetr_cli.model.position import encode_coordinate, sine_position


def test_encoding_equals_the_authors_numbers(golden):
    numbers = golden("position")
    ours = sine_position(numbers["is_padding"], 2 * int(numbers["features_per_axis"]))
    assert ours.shape == numbers["encoding"].shape
    # The authors compute this part in float32: one unit in the last place of an argument near 2 pi.
    torch.testing.assert_close(ours, numbers["encoding"], rtol=0, atol=1e-6)


def test_pixel_centres_sit_half_a_pixel_in():
    encoding = sine_position(torch.zeros(1, 4, 5, dtype=torch.bool), 8)
    # Channel 0 is the sine of y with period 1, channel 4 that of x.
    for row in range(4):
        assert math.isclose(float(encoding[0, 0, row, 0]), math.sin((row + 0.5) / 4 * 2 * math.pi), abs_tol=2e-6)
    for column in range(5):
        assert math.isclose(
            float(encoding[0, 4, 0, column]), math.sin((column + 0.5) / 5 * 2 * math.pi), abs_tol=2e-6
        )


def test_first_half_of_the_channels_is_y_and_second_half_x():
    encoding = sine_position(torch.zeros(1, 6, 7, dtype=torch.bool), 16)
    assert torch.equal(encoding[:, :8, :, 0], encoding[:, :8, :, 6])
    assert torch.equal(encoding[:, 8:, 0], encoding[:, 8:, 5])
    assert not torch.equal(encoding[:, :8, 0], encoding[:, :8, 1])


def test_sines_and_cosines_alternate_with_the_authors_exponents():
    code = encode_coordinate(torch.tensor([0.3], dtype=torch.float64), 6)[0]
    for i in range(3):
        angle = 0.3 * 2 * math.pi / 10_000 ** (2 * i / 6)
        assert math.isclose(float(code[2 * i]), math.sin(angle), abs_tol=1e-6)
        assert math.isclose(float(code[2 * i + 1]), math.cos(angle), abs_tol=1e-6)


def test_padding_does_not_move_valid_pixels():
    is_padding = torch.ones(1, 9, 11, dtype=torch.bool)
    is_padding[:, :6, :7] = False
    padded = sine_position(is_padding, 32)
    alone = sine_position(torch.zeros(1, 6, 7, dtype=torch.bool), 32)
    assert torch.equal(padded[:, :, :6, :7], alone)


def test_wholly_padded_columns_stay_finite():
    is_padding = torch.zeros(1, 4, 4, dtype=torch.bool)
    is_padding[:, :, 2:] = True
    is_padding[:, 3:] = True
    assert bool(torch.isfinite(sine_position(is_padding, 256)).all())


def test_detrs_pixels_count_from_their_far_side():
    encoding = sine_position(torch.zeros(1, 4, 5, dtype=torch.bool), 8, shift=0.0)
    for row in range(4):
        assert math.isclose(float(encoding[0, 0, row, 0]), math.sin((row + 1) / 4 * 2 * math.pi), abs_tol=3e-6)
    for column in range(5):
        assert math.isclose(float(encoding[0, 4, 0, column]), math.sin((column + 1) / 5 * 2 * math.pi), abs_tol=3e-6)
