from __future__ import annotations

import pytest

from ddetr_cli.train.pace import Pacemaker


def test_the_time_left_is_that_of_the_steps_and_validations_to_come() -> None:
    pace = Pacemaker(epochs=4, eval_every=2, device="cpu")
    for _ in range(10):
        pace.step(8, 2.0, 0.1, 0.0)
    pace.end_of_epoch(7.0, is_validated=True)
    # After 1 epoch and 3 of 10 steps: 27 steps of 2 s, and the validations of epochs 2 and 4.
    now = pace.now(1, 3, 10)
    assert now.images_per_second == pytest.approx(4.0)
    assert now.seconds_left == pytest.approx(27 * 2.0 + 2 * 7.0)


def test_no_time_is_told_before_there_is_something_to_reckon_with() -> None:
    pace = Pacemaker(epochs=4, eval_every=1, device="cpu")
    for _ in range(4):
        pace.step(8, 2.0, 0.0, 0.0)
    assert pace.now(0, 4, 100).seconds_left is None


@pytest.mark.parametrize(
    ("device", "waited", "for_device", "expected"),
    [
        ("cpu", 0.5, 0.0, "data"),
        ("cpu", 0.1, 0.0, "device"),
        ("cuda", 0.1, 0.01, "host"),
        ("cuda", 0.1, 0.3, "device"),
        ("cuda", 0.3, 0.01, "data"),
    ],
)
def test_what_holds_a_run_up(device: str, waited: float, for_device: float, expected: str) -> None:
    pace = Pacemaker(epochs=1, eval_every=1, device=device)
    pace.step(2, 1.0, waited, for_device)
    assert pace.now(0, 1, 9).bottleneck == expected
