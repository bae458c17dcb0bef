from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddetr_cli.data.records import CocoAnnotations, CocoCategory
from ddetr_cli.evaluate.measures import by_size, calibrate
from ddetr_cli.evaluate.report import figures
from ddetr_cli.evaluate.report.evaluated import Evaluated, evaluated
from ddetr_cli.evaluate.table import Detection, table_of
from ddetr_cli.plots import to_svg

MakeRun = Callable[..., Evaluated]
RandomSet = Callable[[int], tuple[CocoAnnotations, list[Detection]]]


def all_of(run: Evaluated) -> list[figures.Plot]:
    return [
        figures.precision_recall_by_class(run),
        figures.precision_recall_by_size(run),
        figures.calibration(calibrate(run.matches, run.mistakes)),
        figures.ap_by_size(by_size(run.ground_truth, run.table)),
        figures.mistakes([(run.name, run.mistakes)]),
        figures.confusion(run),
        figures.ap_of_classes(run, run),
    ]


def test_every_plot_has_a_file_name_of_its_own_and_words_for_who_cannot_see_it(make_run: MakeRun) -> None:
    found = all_of(make_run())
    assert len({plot.name for plot in found}) == len(found)
    assert all(plot.title and plot.caption and plot.alt for plot in found)
    assert all(plot.name.replace("_", "").isalnum() for plot in found)


@pytest.mark.parametrize("seed", [0, 4, 6, 11])
def test_plots_of_any_data_can_be_drawn(seed: int, random_set: RandomSet) -> None:
    ground_truth, detections = random_set(seed)
    run = evaluated("run", ground_truth, None, table_of(ground_truth, detections))
    assert all(b"</svg>" in to_svg(plot.figure) for plot in all_of(run))


def test_plots_of_a_run_that_found_nothing_can_be_drawn(truth: Callable[..., CocoAnnotations]) -> None:
    ground_truth = truth((1, 1, (10.0, 10.0, 50.0, 50.0)))
    run = evaluated("run", ground_truth, None, table_of(ground_truth, []))
    assert all(b"</svg>" in to_svg(plot.figure) for plot in all_of(run))


def test_the_curves_are_those_of_the_busiest_classes_and_their_mean(make_run: MakeRun) -> None:
    axes = figures.precision_recall_by_class(make_run()).figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["all 2 classes", "cat", "<dog> & \\$\\pi\\$"]
    mean, cat, dog = (np.asarray(line.get_ydata(), dtype=float) for line in axes.lines)
    assert np.allclose(mean, (cat + dog) / 2)
    assert cat[0] == pytest.approx(1)
    assert not dog.any()


def test_the_confusion_matrix_puts_rare_classes_together(
    truth: Callable[..., CocoAnnotations], tmp_path: Path
) -> None:
    boxes = [(1, k, (30.0 * k, 10.0, 20.0, 20.0)) for k in range(1, 21)]
    ground_truth = truth(*boxes, categories=tuple(CocoCategory(k, f"class {k}") for k in range(1, 21)))
    run = evaluated("run", ground_truth, None, table_of(ground_truth, [Detection(*box, 0.9) for box in boxes]))
    axes = figures.confusion(run).figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[-2:] == ["8 others", "nothing"]
    assert len(names) == 14
    assert sorted(int(text.get_text()) for text in axes.texts) == [1] * 12 + [8]


def test_a_long_name_is_cut_and_one_with_a_dollar_is_no_mathematics() -> None:
    assert figures.short_name("a" * 30) == "a" * 17 + "…"
    assert figures.short_name("$x") == "\\$x"
    assert "\x1b" not in figures.short_name("\x1b[31mred")
