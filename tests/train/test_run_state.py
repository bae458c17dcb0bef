from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from ddetr_cli.errors import OutputError
from ddetr_cli.train.run_state import EpochSums, RunState, append_metrics, clear_run, keep_metrics, open_run


def test_the_counters_of_a_run_survive_json() -> None:
    state = RunState(epoch=3, step=2, unreadable=[4], sums=EpochSums({"loss": 0.1 + 0.2}, counted=2, seconds=1.5))
    assert RunState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_two_trainings_cannot_share_a_run(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            pytest.raises(OutputError, match="locked by pid unknown, another training"),
            open_run(tmp_path, resume=False, overwrite=True),
        ):
            pytest.fail("the lock was given twice")


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("")
    with pytest.raises(OutputError, match="cannot be written"), open_run(file, resume=False, overwrite=True):
        pytest.fail("a file was taken for a folder")


def test_clearing_a_run_leaves_what_training_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    written = ["best.safetensors", "last.safetensors", "diverged.safetensors", "metrics.jsonl", "config.json"]
    for name in (*written, "checkpoints/step-00000012.safetensors", "checkpoints/mine", "notes.txt"):
        (tmp_path / name).write_text("")
    clear_run(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "mine", "notes.txt"]


def test_what_a_killed_training_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / ".ddetr-123-0.tmp").write_text("half a checkpoint")
    with open_run(tmp_path, resume=True, overwrite=False):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_metrics_past_the_state_and_lines_cut_short_are_dropped(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        append_metrics(tmp_path, {"epoch": epoch})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epo')
    keep_metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
