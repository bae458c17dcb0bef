from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from ddetr_cli.cli import console, training
from ddetr_cli.cli.training import TrainingProgress, duration
from ddetr_cli.train.loop import Pace


def _row(**more: Any) -> dict[str, Any]:
    row = {"epoch": 2, "loss": 1.2345, "images_per_second": 4.56, "skipped_steps": 0, "bottleneck": "device"}
    return {**row, **more}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (59.4, "59 s"), (90.0, "2 min"), (3540.0, "59 min"), (11100.0, "3 h 05 min"),
     (187200.0, "2 d 04 h")],
)  # fmt: skip
def test_durations_are_told_as_people_tell_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_has_plain_lines_with_all_there_is_to_know(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "EARLY_SECONDS", 0.0)
    with TrainingProgress(quiet=False) as progress:
        progress.pace(Pace(40, 12.34, 754.0, "data"))
        progress.step(2, 25, 150, 3.14159)
        progress.epoch(_row(bottleneck="data", val=dict.fromkeys(("AP", "AP50", "APs", "APm", "APl"), 0.25)))
    first, second = capsys.readouterr().err.splitlines()
    assert first == ("epoch 2 of 40: 25 of 150 steps, loss 3.142, 12.3 images/s, 13 min left, waiting for pictures")
    assert second.startswith("epoch 2 of 40, loss 1.234, 4.6 images/s, AP 0.250, AP50 0.250, APs 0.250")
    assert second.endswith("13 min left, waiting for pictures: more --workers or --cache may help")


def test_plain_lines_become_rare_after_the_first_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    progress = TrainingProgress(quiet=False)
    for now[0] in range(0, 301, 5):
        progress.step(1, 1, 9, 1.0)
    # At 10, 20, ... 60 s, then once a minute.
    assert len(capsys.readouterr().err.splitlines()) == 6 + 4


def test_a_terminal_shows_one_live_line_and_the_epochs_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert console.is_interactive()
    with TrainingProgress(quiet=False) as progress:
        progress.pace(Pace(40, 12.34, None, "host"))
        progress.step(2, 1, 150, 3.14159)
        progress.warn("[odd] names stay as they are")
        progress.epoch(_row())
        progress.step(3, 1, 150, 3.0)
    text = terminal.getvalue()
    assert "1/150" in text and "loss 3.142" in text and "waiting for Python" in text
    assert "ddetr: warning: [odd] names stay as they are" in text
    assert "epoch 2 of 40, loss 1.234" in text
    assert text.rindex("\x1b[2K") > text.index("epoch 2 of 40, loss")  # the live line is taken away at the end


def test_quiet_says_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(quiet=True) as progress:
        progress.note("nothing")
        progress.step(1, 1, 2, 0.5)
        progress.epoch(_row())
        progress.warn("careful")
    assert capsys.readouterr().err == "ddetr: warning: careful\n"
