from __future__ import annotations

import time

import pytest

from ddetr_cli.detect.ids import assign_image_ids


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["a.jpg", "b.jpg"], [1, 2]),
        # a stem of exactly 12 digits is the id, in any folder and with any ending
        (["val2017/000000039769.jpg", "000000000139.png"], [39769, 139]),
        (["00000000013.jpg", "0000000000139.jpg", "a00000000013.jpg"], [1, 2, 3]),
        # two inputs with one number: neither has it
        (["a/000000000139.jpg", "b/000000000139.png"], [1, 2]),
        # a position that is taken by a number moves on, and so do those behind it
        (["000000000003.jpg", "a.jpg", "b.jpg", "c.jpg"], [3, 2, 4, 5]),
        (["000000000002.jpg", "000000000003.jpg", "a.jpg", "b.jpg"], [2, 3, 4, 5]),
        (["a.jpg", "b.jpg", "000000000001.jpg"], [2, 3, 1]),
        (["000000000000.jpg"], [0]),
        # digits of other scripts are letters here
        (["٠٠٠٠٠٠٠٠٠٠٠١.jpg"], [1]),
        ([], []),
    ],
)
def test_ids_are_coco_numbers_or_positions(names: list[str], ids: list[int]) -> None:
    assert assign_image_ids(names) == ids


def test_a_hundred_thousand_names_take_no_time_even_when_every_position_is_taken() -> None:
    names = [f"{number:012d}.jpg" for number in range(1, 50_001)] + [f"x{number}.jpg" for number in range(50_000)]
    start = time.process_time()
    ids = assign_image_ids(names)
    assert time.process_time() - start < 5  # a quadratic search takes minutes
    assert len(set(ids)) == len(names)
