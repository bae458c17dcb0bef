"""Trainings that are told to stop, and trainings whose helpers die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.errors import OutputError
from ddetr_cli.train.checkpoints import read_snapshot
from ddetr_cli.train.run_state import open_run

# Leaves a file after the first step, and gives signals time to arrive.
SLOW_STEPS = """
import pathlib, time
from ddetr_cli.train.loop import Trainer
_step = Trainer.step
def _slow(self, *args, **more):
    result = _step(self, *args, **more)
    pathlib.Path({sign!r}).touch()
    time.sleep({seconds})
    return result
Trainer.step = _slow
"""
IN_SAVE = """
import os, signal
from ddetr_cli.train.checkpoints import Checkpoints
_write = Checkpoints._write
def _signalled(self, path, content):
    os.kill(os.getpid(), signal.SIGTERM)
    _write(self, path, content)
Checkpoints._write = _signalled
"""


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    """Epochs without end, and no checkpoint in the first ten minutes of one."""
    return [
        "train", str(data), "-o", str(run), "--preset", "tiny", "--image-size", "48", "--queries", "9",
        "--epochs", "9999", "--eval-every", "9999", "--batch-size", "2", "--device", "cpu", *more,
    ]  # fmt: skip


def wait_for(is_there: Callable[[], Any], process: Any, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not is_there():
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(session: int) -> bool:
    """Whether no process of a session is left, or will be in half a minute."""
    for _ in range(300):
        alive = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    is_one = os.getsid(int(entry.name)) == session
                    alive += [entry.name] if is_one and "State:\tZ" not in (entry / "status").read_text() else []
                except OSError:
                    continue
        if not alive:
            return True
        time.sleep(0.1)
    return False


def saved_steps(run: Path) -> int:
    """The steps of the one checkpoint there is, which must be whole."""
    (path,) = (run / "checkpoints").iterdir()
    steps = read_snapshot(path).facts["steps_done"]
    assert path.name == f"step-{steps:08d}.safetensors"
    return int(steps)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_names_the_command_to_go_on_with(
    number: signal.Signals, code: int, dozen: Path, trainings: Any, tmp_path: Path
) -> None:
    run, log, sign = tmp_path / "run", tmp_path / "log", tmp_path / "sign"
    before = SLOW_STEPS.format(sign=str(sign), seconds=0.1)
    process = trainings.start(arguments(dozen, run), log, before=before)
    wait_for(sign.exists, process, log)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == code, log.read_text()
    assert f"Go on with: ddetr train --resume {run}" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert saved_steps(run) >= 1


def test_a_second_sigterm_does_not_wait_for_the_step(dozen: Path, trainings: Any, tmp_path: Path) -> None:
    run, log, sign = tmp_path / "run", tmp_path / "log", tmp_path / "sign"
    process = trainings.start(arguments(dozen, run), log, before=SLOW_STEPS.format(sign=str(sign), seconds=9999))
    wait_for(sign.exists, process, log)
    os.kill(process.pid, signal.SIGTERM)
    wait_for(lambda: "once more stops at once" in log.read_text(), process, log)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 143, log.read_text()
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_a_signal_in_the_middle_of_a_save_waits_for_it(dozen: Path, trainings: Any, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert trainings.run(arguments(dozen, run, "--save-every", "0"), log, before=IN_SAVE) in (143,), log.read_text()
    # The first signal was sent in the save after step 1, a second, which stops at once, in the one for the stop.
    assert saved_steps(run) == 1
    assert not list(run.rglob(".ddetr-*"))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_reaches_the_whole_group_and_leaves_neither_tracebacks_nor_orphans(
    times: int, dozen: Path, trainings: Any, tmp_path: Path
) -> None:
    run, log, sign = tmp_path / "run", tmp_path / "log", tmp_path / "sign"
    before = SLOW_STEPS.format(sign=str(sign), seconds=0.5)
    process = trainings.start(arguments(dozen, run, "--workers", "2"), log, before=before)
    wait_for(sign.exists, process, log)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
    process.join(120)
    assert process.exitcode == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    assert is_gone(process.pid)


@pytest.mark.slow
def test_a_killed_reading_process_ends_the_training_with_everything_saved(
    dozen: Path, trainings: Any, tmp_path: Path
) -> None:
    run, log, sign = tmp_path / "run", tmp_path / "log", tmp_path / "sign"
    before = SLOW_STEPS.format(sign=str(sign), seconds=0.05)
    process = trainings.start(arguments(dozen, run, "--workers", "2", "--batch-size", "1"), log, before=before)
    wait_for(sign.exists, process, log)
    wait_for(lambda: children(process.pid), process, log)
    while process.is_alive() and not (found := children(process.pid)):
        time.sleep(0.01)
    os.kill(found[0], signal.SIGKILL)
    process.join(120)
    assert process.exitcode == 8, log.read_text()
    assert "was killed, probably out of memory" in log.read_text()
    assert f"saved. Go on with: ddetr train --resume {run}" in log.read_text()
    assert saved_steps(run) >= 1
    assert is_gone(process.pid)


def test_a_second_training_is_told_who_holds_the_run_and_takes_over_from_a_dead_one(
    dozen: Path, trainings: Any, tmp_path: Path
) -> None:
    run, log, sign = tmp_path / "run", tmp_path / "log", tmp_path / "sign"
    before = SLOW_STEPS.format(sign=str(sign), seconds=9999)
    process = trainings.start(arguments(dozen, run), log, before=before)
    try:
        wait_for(sign.exists, process, log)
        with (
            pytest.raises(OutputError, match=f"locked by pid {process.pid}"),
            open_run(run, resume=True, overwrite=False),
        ):
            pytest.fail("the lock was given twice")
    finally:
        process.kill()
        process.join()
    with open_run(run, resume=True, overwrite=False):
        assert (run / ".lock").read_text() == str(os.getpid())
