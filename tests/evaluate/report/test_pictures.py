from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ddetr_cli.evaluate.report import pictures
from ddetr_cli.evaluate.report.evaluated import Evaluated
from ddetr_cli.evaluate.table import Detection

MakeRun = Callable[..., Evaluated]
A = (100.0, 100.0, 100.0, 100.0)


def test_each_image_has_its_own_hits_and_mistakes(make_run: MakeRun) -> None:
    run = make_run()
    first, second = pictures.tallies(run)
    kept = run.verdicts.threshold
    assert kept == 0.9  # one hit of three objects: more detections only make it worse
    assert (len(first.found), len(first.missed), len(first.wrong)) == (1, 1, 0)
    assert (len(second.found), len(second.missed), len(second.wrong)) == (0, 1, 0)


def test_the_worst_pictures_come_first_and_perfect_ones_not_at_all(make_run: MakeRun) -> None:
    run = make_run(Detection(1, 1, A, 0.9), Detection(2, 1, A, 0.9))
    assert [(tally.position, tally.mistakes) for tally in pictures.worst(run, 5)] == [(0, 1)]
    assert pictures.worst(make_run(), 1)[0].position == 0


def test_a_picture_lies_under_its_boxes(make_run: MakeRun, images: Path, checked: Callable[[str], object]) -> None:
    run = make_run(images=images)
    text = pictures.picture(run, pictures.tallies(run)[0])
    checked(text)
    assert '<img src="data:image/jpeg;base64,' in text
    assert '<svg viewBox="0 0 640 480"' in text
    assert '<rect x="100.0" y="100.0" width="100.0" height="100.0" class="found"><title>found: cat</title>' in text
    assert text.count('class="missed"') == 2  # box and label
    assert "<dog>" not in text
    assert "missed: &lt;dog&gt; &amp; $" in text


@pytest.mark.parametrize("is_there", [True, False])
def test_boxes_are_drawn_without_a_picture_too(make_run: MakeRun, images: Path, is_there: bool) -> None:
    (images / "1.jpg").write_bytes(b"not a picture")
    run = make_run(images=images if is_there else None)
    text = pictures.picture(run, pictures.tallies(run)[0])
    assert '<div class="empty" style="aspect-ratio:640 / 480"></div>' in text
    assert "<rect" in text


def test_the_caption_says_what_is_wrong_in_words(make_run: MakeRun) -> None:
    run = make_run(Detection(1, 1, A, 0.9), Detection(2, 1, A, 0.9), Detection(1, 1, A, 0.95))
    first = pictures.tallies(run)[0]
    assert pictures.caption(run, first) == "<b>1.jpg</b>: 1 found, 1 missed, 1 wrong (1 duplicate)"
