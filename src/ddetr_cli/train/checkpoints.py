"""The states a run can go on from: RUN/checkpoints/step-<optimizer steps>.safetensors.

Each holds every tensor that training changes and, as JSON in its header, where the run stands, with one checksum over
both. They appear whole or not at all, are read again after writing, and the newest is the one of the most steps,
whatever the clock says. Nothing in them is code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ddetr_cli import __version__
from ddetr_cli.atomic import write_atomically
from ddetr_cli.errors import CheckpointError, OutputError
from ddetr_cli.train.run_state import CHECKPOINTS
from ddetr_cli.weights import tensorfile
from ddetr_cli.weights.checkpoint import digest
from ddetr_cli.weights.reader import file_sha256

FORMAT = 1
_KEY = "ddetr-run"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Snapshot:
    """The state of a run: tensors on the CPU, and facts of plain JSON types."""

    tensors: Mapping[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """Those of one run; the newest ``keep`` stay."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.folder, self.keep = run, run / CHECKPOINTS, keep
        self._damaged: list[Path] = []

    def found(self) -> list[Path]:
        """All there are, the newest first."""
        steps = {path: int(match[1]) for path in self.folder.glob("*") if (match := _NAME.fullmatch(path.name))}
        return sorted(steps, key=lambda path: steps[path], reverse=True)

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Write the state after ``step`` steps, then remove those beyond ``keep``.

        On a full disk the latter comes first, and one more attempt. Raises OutputError; the older ones are then as
        they were. CheckpointError for a state that is not finite.
        """
        path = self.folder / f"step-{step:08d}.safetensors"
        content = _packed(path, snapshot)
        try:
            self._write(path, content)
        except OutputError as error:
            if not _is_full(error) or not self._remove_beyond(max(self.keep - 1, 1), besides=path):
                raise self._refusal(path, len(content), error) from error
            try:
                self._write(path, content)
            except OutputError as again:
                raise self._refusal(path, len(content), again) from again
        self._remove_beyond(self.keep)

    def save_apart(self, path: Path, snapshot: Snapshot) -> None:
        """Write a state that is not to be gone on from. Raises OutputError or CheckpointError."""
        self._write(path, _packed(path, snapshot))

    def newest(self, warn: Callable[[str], None]) -> Snapshot:
        """The newest state that is whole; every damaged one that is newer is warned of, and none is deleted.

        Raises CheckpointError where there is none, or where it holds NaN.
        """
        paths = self.found()
        if not paths:
            raise CheckpointError(
                f"{self.folder}: no checkpoint (the run ended before its first). Start it without --resume."
            )
        for number, path in enumerate(paths):
            try:
                snapshot = read_snapshot(path)
            except CheckpointError as error:
                self._damaged.append(path)
                warn(f"{error} Going back to an older checkpoint.")
                continue
            bad = _not_finite(snapshot)
            if bad is not None:
                raise CheckpointError(f"{path}: {bad} holds NaN or infinity. {self._older(paths[number + 1 :])}")
            return snapshot
        raise CheckpointError(
            f"{self.folder}: every checkpoint is damaged ({', '.join(path.name for path in paths)}). "
            "Start a new run, with --init if there is a model of this one."
        )

    def _older(self, paths: list[Path]) -> str:
        for path in paths:
            try:
                if _not_finite(read_snapshot(path)) is None:
                    return f"{path} before it is good: move this one away to go on from there."
            except CheckpointError:
                continue
        return "No older one is good: start a new run with a lower --learning-rate."

    def _write(self, path: Path, content: bytes) -> None:
        write_atomically(path, content, durable=True)
        if file_sha256(path) != hashlib.sha256(content).hexdigest():
            self._damaged.append(path)
            raise OutputError(f"{path}: does not hold what was written (a failing disk?). Use another.")

    def _remove_beyond(self, keep: int, *, besides: Path | None = None) -> bool:
        """Whether anything was removed: damaged ones, then the oldest."""
        whole = [path for path in self.found() if path not in self._damaged and path != besides]
        surplus = [path for path in self._damaged if path != besides and path.exists()] if whole else []
        surplus += whole[keep:]
        for path in surplus:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{path}: not removed ({error.strerror}). Check the rights of its folder."
                ) from error
        self._damaged = [path for path in self._damaged if path not in surplus]
        return bool(surplus)

    def _refusal(self, path: Path, needed: int, error: OutputError) -> OutputError:
        if not _is_full(error):
            return error
        free = shutil.disk_usage(self.run).free
        kept = next((f"{p.name} is whole. " for p in self.found() if p not in self._damaged), "")
        return OutputError(
            f"{path}: not written ({error.__cause__.strerror}: {megabytes(needed)} needed, {megabytes(free)} free). "  # type: ignore[union-attr]
            f"{kept}Free space, then go on with: ddetr train --resume {self.run}"
        )


def read_snapshot(path: Path) -> Snapshot:
    """One state, its checksum verified. Raises CheckpointError."""
    try:
        metadata, tensors = tensorfile.read(path)
        header = json.loads(metadata[_KEY])
        version, facts, expected = header["format"], header["facts"], header["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged (no state of a run in its header).") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{path}: made by ddetr {str(header.get('ddetr_version'))[:40]} (format {str(version)[:20]}, this is "
            f"ddetr {__version__} with format {FORMAT}). Resume with that version."
        )
    if _checksum(tensors, facts) != expected:
        raise CheckpointError(f"{path}: damaged (its content does not match its checksum).")
    return Snapshot(tensors, facts)


def megabytes(size: int) -> str:
    """A number of bytes for people: 25.6 MB."""
    return f"{size / 1e6:.1f} MB"


def _packed(path: Path, snapshot: Snapshot) -> bytes:
    bad = _not_finite(snapshot)
    if bad is not None:
        raise CheckpointError(f"{path}: not saved ({bad} holds NaN or infinity). Go back to an earlier checkpoint.")
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in snapshot.tensors.items()}
    header = {
        "format": FORMAT,
        "ddetr_version": __version__,
        "facts": snapshot.facts,
        "sha256": _checksum(tensors, snapshot.facts),
    }
    return safetensors.torch.save(tensors, {_KEY: json.dumps(header, allow_nan=False)})


def _checksum(tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(f"{digest(tensors)}\0{text}".encode()).hexdigest()


def _not_finite(snapshot: Snapshot) -> str | None:
    """The name of the first tensor that is not finite."""
    for name, tensor in snapshot.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def _is_full(error: OutputError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL
