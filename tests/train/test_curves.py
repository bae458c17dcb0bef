from __future__ import annotations

import pytest

from ddetr_cli.train.curves import draw_curves

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'ddetr-cli[plots]'")


def _row(epoch: int, **more: object) -> dict[str, object]:
    return {"epoch": epoch, "loss": 10.0 / epoch, "learning_rate": 1e-4, **more}


def test_each_plot_shows_the_numbers_of_the_run() -> None:
    val = {"AP": 0.2, "AP50": 0.5, "APs": None}
    rows = [_row(1), _row(2, val=val), _row(3), _row(4, val={**val, "AP": 0.1, "APs": 0.05})]
    loss, scores, rate = draw_curves(rows, "run").axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 10.0], [2, 5.0], [3, 10 / 3], [4, 2.5]]
    names = [text.get_text() for text in scores.texts]
    by_name = {name: line.get_xydata().tolist() for name, line in zip(names, scores.lines, strict=True)}
    assert by_name["AP"] == [[2, 0.2], [4, 0.1]]
    assert by_name["AP50"] == [[2, 0.5], [4, 0.5]]
    assert by_name["AP small"] == [[4, 0.05]]  # none in the first
    assert scores.get_title(loc="left") == "validation: best AP 0.200 in epoch 2"
    assert rate.lines[0].get_ydata().tolist() == [1e-4] * 4


def test_a_run_without_a_validation_or_a_finite_loss_is_drawn_too() -> None:
    _, scores, _ = draw_curves([{"epoch": 1, "learning_rate": 1e-4}], "run").axes
    assert not scores.lines and scores.get_title(loc="left") == "validation"
