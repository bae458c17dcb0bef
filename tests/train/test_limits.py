"""Machines that are short of something: a full disk, no memory, no shared memory, few open files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "train", str(data), "-o", str(run), "--preset", "tiny", "--image-size", "96", "--queries", "9",
        "--epochs", "2", "--batch-size", "4", "--device", "cpu", *more,
    ]  # fmt: skip


def train_after_mounting(
    size: int, where: Path, command: list[str], nano_code: str
) -> subprocess.CompletedProcess[str]:
    """``ddetr *command`` with ``size`` bytes of memory mounted at ``where``; prints what lies there at the end."""
    program = f"{nano_code}\nimport sys\nfrom ddetr_cli.cli.app import main\nsys.exit(main({command!r}))"
    script = 'mount -t tmpfs -o "size=$1" tmpfs "$2" || exit 99; "$0" -c "$3"; code=$?; find "$2" -type f; exit $code'
    try:
        done = subprocess.run(
            ["unshare", "-m", "bash", "-c", script, sys.executable, str(size), str(where), program],
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare on this system")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    return done


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint_and_says_what_is_needed(
    dozen: Path, trainings: Any, tmp_path: Path, nano_code: str
) -> None:
    measured, disk = tmp_path / "measured", tmp_path / "disk"
    assert trainings.run(arguments(dozen, measured), tmp_path / "log") == 0
    size = max((measured / "checkpoints").iterdir()).stat().st_size
    disk.mkdir()
    command = arguments(dozen, disk / "run", "--save-every", "0")
    done = train_after_mounting(size * 8 // 5, disk, command, nano_code)
    assert done.returncode == 7, done.stderr
    assert "room for fewer than three" in done.stderr
    assert "No space left on device" in done.stderr and f"{size / 1e6:.1f} MB needed" in done.stderr
    assert "step-00000001.safetensors is whole" in done.stderr
    left = [Path(line).name for line in done.stdout.splitlines()]
    assert sorted(left) == ["config.json", "step-00000001.safetensors"]


def test_almost_no_shared_memory_costs_the_readers_and_not_the_training(
    dozen: Path, tmp_path: Path, nano_code: str
) -> None:
    run = tmp_path / "run"
    done = train_after_mounting(1 << 20, Path("/dev/shm"), arguments(dozen, run, "--workers", "2"), nano_code)
    assert done.returncode == 0, done.stderr
    assert "/dev/shm has 1 MiB" in done.stderr and "of 2 processes that read images" in done.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_few_open_files_cost_the_readers_and_not_the_training(dozen: Path, trainings: Any, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
    assert trainings.run(arguments(dozen, run, "--workers", "2"), log, before=limit) == 0, log.read_text()
    assert "the limit is 64 (ulimit -n)" in log.read_text()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("allocation", ["torch.zeros(1 << 28)", "numpy.ones(1 << 28)"])
def test_a_limit_of_memory_ends_the_training_with_what_helps_and_it_goes_on_from_there(
    allocation: str, dozen: Path, trainings: Any, tmp_path: Path
) -> None:
    short = f"""
import numpy, resource, torch
from ddetr_cli.train.loop import Trainer
_plenty = Trainer.step
def _short(self, *args, **more):
    if self.steps_done == 4:
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20), resource.RLIM_INFINITY))
        {allocation}
    return _plenty(self, *args, **more)
Trainer.step = _short
"""
    run, log = tmp_path / "run", tmp_path / "log"
    assert trainings.run(arguments(dozen, run), log, before=short) == 8, log.read_text()
    text = log.read_text()
    assert "out of memory" in text and "--accumulate N" in text and "Traceback" not in text
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003.safetensors"]
    assert trainings.run(["train", "--resume", str(run), "--override", "--accumulate", "2"], log) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
