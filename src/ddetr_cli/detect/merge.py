"""Parts of a run, of several machines or processes, made into the files of the whole."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ddetr_cli.atomic import AtomicFile, output_error
from ddetr_cli.detect.journal import Finished, RunHeader
from ddetr_cli.detect.results import RunSummary, count_result
from ddetr_cli.detect.session import journals_in
from ddetr_cli.detect.sources import CROPS_FOLDER, PICTURES_FOLDER
from ddetr_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ddetr_cli.detect.results import Sink
    from ddetr_cli.detect.sources import Input


def read_parts(folders: Sequence[Path]) -> tuple[RunHeader, Finished]:
    """The run whose shards lie in ``folders``, in any order, and all it has finished.

    Raises UsageError where they are not all the shards of one run, or one is not finished, and OutputError.
    """
    paths: list[Path] = []
    seen: dict[tuple[int, int], Path] = {}
    for folder in folders:
        found = journals_in(folder)
        if not found:
            raise UsageError(
                f"{folder}: no run of ddetr detect (journal.jsonl is missing). Give the --output of shards."
            )
        paths += found
    finished = Finished(paths)
    first = finished.headers[0]
    for path, header in zip(paths, finished.headers, strict=True):
        if differences := first.differences(replace(header, shard=first.shard)):
            raise UsageError(
                f"--merge: {path.parent} is of another run than {paths[0].parent} ({'; '.join(differences)})."
            )
        if header.shard[1] != first.shard[1]:
            raise UsageError("--merge: {} is shard {}/{}, {} is {}/{}. Give shards of one run.".format(
                paths[0].parent, *first.shard, path.parent, *header.shard
            ))  # fmt: skip
        if seen.setdefault(header.shard, path.parent) != path.parent:
            raise UsageError(f"--merge: {path.parent} is the same shard as {seen[header.shard]}. Give each once.")
        missing = sum(position not in finished for position in header.positions)
        if missing:
            raise UsageError(
                f"--merge: {path.parent} is not finished ({missing} of {len(header.positions)} images are missing). "
                "Repeat its command with --resume."
            )
    absent = [number for number in range(1, first.shard[1] + 1) if (number, first.shard[1]) not in seen]
    if absent:
        raise UsageError(f"--merge: shard {absent[0]}/{first.shard[1]} is missing. Give all of them.")
    return replace(first, shard=(1, 1)), finished


def replay(
    finished: Finished, positions: range, sinks: Sequence[Sink], inputs: Sequence[Input] | None = None
) -> RunSummary:
    """Give ``sinks`` all the finished results of ``positions``, in order, and finish them.

    ``inputs``: all inputs of the run; without, each is known by its path and name. Raises OutputError, with all sinks
    abandoned.
    """
    summary = RunSummary(resumed=len(positions))
    try:
        for position in positions:
            result = finished.read(position, None if inputs is None else inputs[position])
            for sink in sinks:
                sink.add(result, None)
            count_result(summary, result)
        for sink in sinks:
            sink.finish()
    except BaseException:
        for sink in sinks:
            sink.abandon()
        raise
    return summary


def write_journal(path: Path, header: RunHeader, finished: Finished) -> None:
    """One journal of all that is finished: that of a single run. Raises OutputError."""
    file = AtomicFile(path)
    try:
        file.write(header.to_line())
        for position in header.positions:
            file.write(finished.line(position))
        file.commit(durable=True)
    except BaseException:
        file.abandon()
        raise


def gather_pictures(folders: Sequence[Path], output: Path) -> None:
    """The pictures and crops of ``folders``, under their names in ``output``; linked where the disk can."""
    for folder in folders:
        for name in (PICTURES_FOLDER, CROPS_FOLDER):
            for current, _, files in os.walk(folder / name):
                target = output / os.path.relpath(current, folder)
                try:
                    target.mkdir(parents=True, exist_ok=True)
                    for file in files:
                        _link(os.path.join(current, file), os.path.join(target, file))
                except OSError as error:
                    raise output_error(target, error) from error


def _link(source: str, target: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(target)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
