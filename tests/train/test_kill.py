"""Trainings that are killed: whatever the moment, going on gives what an uninterrupted run gives."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.weights import tensorfile
from ddetr_cli.weights.checkpoint import digest

pytestmark = pytest.mark.slow
TIMES = {"seconds", "wait_seconds", "images_per_second", "bottleneck"}
# Kills the process where it is about to rename a file for the n-th time.
IN_RENAME = """
import itertools, os, signal
_count, _replace = itertools.count(1), os.replace
def _kill(source, target, **more):
    if next(_count) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    _replace(source, target, **more)
os.replace = _kill
"""


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    """2 epochs of 3 steps with a checkpoint after each step."""
    return [
        "train", str(data), "-o", str(run), "--preset", "tiny", "--image-size", "48", "--queries", "9",
        "--epochs", "2", "--batch-size", "4", "--device", "cpu", "--save-every", "0", *more,
    ]  # fmt: skip


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, tuple[dict[str, str], str]]]:
    """All that a run leaves, but for what the clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    paths = [run / "best.safetensors", run / "last.safetensors", max((run / "checkpoints").iterdir())]
    return (
        [{key: value for key, value in row.items() if key not in TIMES} for row in rows],
        {path.name: (metadata, digest(tensors)) for path in paths for metadata, tensors in [tensorfile.read(path)]},
    )


@pytest.fixture(scope="module")
def uninterrupted(dozen: Path, trainings: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert trainings.run(arguments(dozen, run), run.parent / "log") == 0
    return run


def go_on(trainings: Any, data: Path, run: Path, log: Path, **more: str) -> int | None:
    """Resume ``run``, or start it where it had not come to its first checkpoint."""
    if not any((run / "checkpoints").glob("step-*.safetensors")):
        return trainings.run(arguments(data, run, "--overwrite"), log, **more)  # type: ignore[no-any-return]
    return trainings.run(["train", "--resume", str(run)], log, **more)  # type: ignore[no-any-return]


def test_killed_at_twenty_random_moments(uninterrupted: Path, dozen: Path, trainings: Any, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    rng, kills = random.Random(5), 0
    # Each life is short, so that twenty of them do not reach the end; a new run is begun where they do.
    for _ in range(60):
        start = arguments(dozen, run, "--overwrite")
        if any((run / "checkpoints").glob("step-*.safetensors")):
            start = ["train", "--resume", str(run)]
        process = trainings.start(start, log)
        deadline = time.monotonic() + 60
        before = set((run / "checkpoints").glob("*"))
        while process.is_alive() and time.monotonic() < deadline:  # loading is not what is tested
            if set((run / "checkpoints").glob("*")) - before:
                break
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.15))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            assert outcome(run) == outcome(uninterrupted)
            shutil.rmtree(run)
        if kills == 20:
            break
    assert kills == 20
    assert go_on(trainings, dozen, run, log) == 0, log.read_text()
    assert outcome(run) == outcome(uninterrupted)


def test_killed_at_every_rename(uninterrupted: Path, dozen: Path, trainings: Any, tmp_path: Path) -> None:
    # config.json, 6 steps, and for both epochs best (the second may be no better), last and the epoch's checkpoint.
    for number in range(1, 40):
        run, log = tmp_path / f"run{number}", tmp_path / "log"
        hook = IN_RENAME.format(number=number)
        code = trainings.run(arguments(dozen, run), log, before=hook)
        if code == 0:  # fewer renames than that
            assert number > 1 + 6 + 1 + 2 + 2
            return
        assert code == -signal.SIGKILL, log.read_text()
        assert go_on(trainings, dozen, run, log) == 0, log.read_text()
        assert outcome(run) == outcome(uninterrupted), number
        assert not list(run.rglob(".ddetr-*")), "what the killed process left half-written"
        shutil.rmtree(run)
    pytest.fail("the run never ended")


@pytest.mark.parametrize(("call", "number"), [("rename", 3), ("fsync", 5)])
def test_killed_by_the_kernel_in_a_system_call(
    call: str, number: int, uninterrupted: Path, dozen: Path, trainings: Any, tmp_path: Path, nano_code: str
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace on this system")
    run = tmp_path / "run"
    code = (
        f"import sys, torch\ntorch.set_num_threads(1)\n{nano_code}\n"
        f"from ddetr_cli.cli.app import main\nsys.exit(main({arguments(dozen, run)!r}))"
    )
    traced = [
        "strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}",
        "-e", f"inject={call}:signal=SIGKILL:when={number}", sys.executable, "-c", code,
    ]  # fmt: skip
    done = subprocess.run(traced, capture_output=True, text=True, timeout=240)
    if "ptrace" in done.stderr or "not permitted" in done.stderr:
        pytest.skip(f"tracing is not allowed here: {done.stderr.strip()}")
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    assert go_on(trainings, dozen, run, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert outcome(run) == outcome(uninterrupted)


def test_killed_again_and_again_with_reading_processes_the_run_ends_the_same(
    uninterrupted: Path, dozen: Path, trainings: Any, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = trainings.start(arguments(dozen, run, "--workers", "2"), log)
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        if len(list((run / "checkpoints").glob("step-*"))) == 2:
            break
        time.sleep(0.002)
    process.kill()
    process.join()
    # At once: readers that outlive their parent for a moment must not hold its lock.
    assert trainings.run(["train", "--resume", str(run)], log) == 0, log.read_text()
    assert outcome(run) == outcome(uninterrupted)
    assert not running(process.pid), "the readers of a killed training are still there"


def running(session: int) -> list[int]:
    """The processes of a session that are still alive half a minute later at the latest."""
    for _ in range(300):
        alive = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.getsid(int(entry.name)) == session and "State:\tZ" not in (entry / "status").read_text():
                        alive.append(int(entry.name))
                except (OSError, ProcessLookupError):
                    continue
        if not alive:
            return []
        time.sleep(0.1)
    return alive
