from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr_cli.atomic import output_error, write_atomically
from ddetr_cli.errors import CheckpointError, OutputError
from ddetr_cli.train import checkpoints
from ddetr_cli.train.checkpoints import Checkpoints, Snapshot, read_snapshot


def snapshot(value: float) -> Snapshot:
    tensors = {"model/weight": torch.full((3, 2), value), "model/steps": torch.tensor(7)}
    return Snapshot(tensors, {"epoch": 1, "sums": {"loss": 0.1 + value}})


def steps(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_a_state_comes_back_as_it_was(tmp_path: Path, watcher: type[Any]) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    kept.save(3, snapshot(0.2))
    found = kept.newest(watcher().warn)
    assert found.facts == {"epoch": 1, "sums": {"loss": 0.1 + 0.2}}
    assert found.tensors.keys() == {"model/weight", "model/steps"}
    assert torch.equal(found.tensors["model/weight"], torch.full((3, 2), 0.2))


def test_the_newest_are_kept_by_their_steps(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 30, 100_000_000):
        kept.save(step, snapshot(float(step)))
    assert steps(tmp_path) == [30, 100_000_000]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    kept.save(1, snapshot(1.0))
    with pytest.raises(CheckpointError, match=r"not saved \(model/weight holds NaN"):
        kept.save(2, snapshot(float("nan")))
    assert steps(tmp_path) == [1]


def test_a_damaged_checkpoint_goes_with_the_next_good_one_and_never_for_it(
    tmp_path: Path, watcher: type[Any]
) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        kept.save(step, snapshot(float(step)))
    (tmp_path / "checkpoints" / "step-00000003.safetensors").write_bytes(b"cut")
    resumed = Checkpoints(tmp_path, keep=2)
    progress = watcher()
    assert resumed.newest(progress.warn).tensors["model/weight"][0, 0] == 2.0
    assert len(progress.warnings) == 1 and steps(tmp_path) == [2, 3]
    # Less far than the damaged one was, and still the newest good one.
    resumed.save(2, snapshot(2.5))
    assert steps(tmp_path) == [2]


class Disk:
    """Has room for ``room`` checkpoints."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room, self.attempts = folder, room, 0

    def write(self, path: Path, data: bytes, *, durable: bool) -> None:
        self.attempts += 1
        if len(list(self.folder.iterdir())) >= self.room:
            full = OSError(errno.ENOSPC, "No space left on device")
            raise output_error(path, full) from full
        write_atomically(path, data, durable=durable)


def test_a_full_disk_costs_the_oldest_checkpoint_and_one_more_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        kept.save(step, snapshot(float(step)))
    disk = Disk(tmp_path / "checkpoints", room=3)
    monkeypatch.setattr(checkpoints, "write_atomically", disk.write)
    kept.save(4, snapshot(4.0))
    assert (steps(tmp_path), disk.attempts) == ([2, 3, 4], 2)


def test_a_disk_that_stays_full_is_refused_with_the_numbers_and_the_newest_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        kept.save(step, snapshot(float(step)))
    disk = Disk(tmp_path / "checkpoints", room=0)
    monkeypatch.setattr(checkpoints, "write_atomically", disk.write)
    with pytest.raises(OutputError, match=r"No space left on device: 0\.0 MB needed, .* MB free") as caught:
        kept.save(3, snapshot(3.0))
    assert "step-00000002.safetensors is whole" in str(caught.value)
    assert (caught.value.exit_code, disk.attempts) == (7, 2)
    assert read_snapshot(tmp_path / "checkpoints" / "step-00000002.safetensors").tensors["model/weight"][0, 0] == 2.0


def test_the_only_checkpoint_is_never_given_up_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(1, snapshot(1.0))
    disk = Disk(tmp_path / "checkpoints", room=1)
    monkeypatch.setattr(checkpoints, "write_atomically", disk.write)
    with pytest.raises(OutputError, match="No space left"):
        kept.save(2, snapshot(2.0))
    assert (steps(tmp_path), disk.attempts) == ([1], 1)


def test_a_save_that_wrote_something_else_is_noticed_and_the_older_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(1, snapshot(1.0))

    def lie(path: Path, data: bytes, *, durable: bool) -> None:
        path.write_bytes(b"\0" * len(data))

    monkeypatch.setattr(checkpoints, "write_atomically", lie)
    with pytest.raises(OutputError, match="does not hold what was written"):
        kept.save(2, snapshot(2.0))
    assert 1 in steps(tmp_path)
