"""One run of ``ddetr detect`` in several parts: processes that torchrun starts, and shards merged afterwards."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import typer

from ddetr_cli.cli import console
from ddetr_cli.cli.detect_report import exit_code
from ddetr_cli.detect.sinks.formats import DRAWN

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    from PIL import Image

    from ddetr_cli.detect.journal import Journal, RunHeader
    from ddetr_cli.detect.manifest import Manifest
    from ddetr_cli.detect.results import ImageResult, RunSummary, Sink
    from ddetr_cli.detect.sources import Input
    from ddetr_cli.distributed import Ranks

# A process waits for the slowest at the end, however long that takes.
_PATIENCE = timedelta(days=30)


class Processes:
    """The processes of a run, by default this one alone, and what they do together in its output folder.

    Each keeps a journal of its own and draws its own pictures; the main one alone holds the lock, and at the end
    writes the tables from all the journals.
    """

    def __init__(self, stack: ExitStack, device: str, ranks: Ranks | None = None) -> None:
        self.device = device
        self.index, self.count = (0, 1) if ranks is None else (ranks.index, ranks.count)
        self._stack = stack
        self._ranks = ranks
        self._journal: Journal | None = None
        self._manifest: Manifest | None = None
        self._make: Callable[[], list[Sink]] = list

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes the tables and talks."""
        return self.index == 0

    def stretch(self, positions: range) -> range:
        """This process's part of the inputs."""
        from ddetr_cli.detect.journal import stretch

        return stretch(positions, self.index + 1, self.count)

    def take_folder(
        self, folder: Path, inputs: Sequence[Input], *, formats: Collection[str], overwrite: bool, resume: bool
    ) -> None:
        """Check the output folder and lock it until the end of the run. Raises OutputError and UsageError."""
        from ddetr_cli.detect.session import check_resumable, own_folder, remove_journals
        from ddetr_cli.detect.sinks.output import prepare_output

        if self.is_main:
            prepare_output(folder, inputs, overwrite=overwrite or resume, formats=formats)
            if resume:
                check_resumable(folder)
            self._stack.enter_context(own_folder(folder))
            if self.count > 1 and not resume:
                remove_journals(folder)
        self._wait()

    def open_journal(
        self, folder: Path, header: RunHeader, sources: Sequence[str], *, resume: bool, skip_failed: bool
    ) -> Journal:
        """This process's journal; the main one begins run.json too. Raises OutputError and UsageError."""
        from ddetr_cli.detect.manifest import Manifest
        from ddetr_cli.detect.session import open_journal

        self._journal = open_journal(
            folder, header, resume=resume, skip_failed=skip_failed, process=(self.index + 1, self.count)
        )
        self._wait()  # until all have read what was finished, before any writes more
        if self.is_main:
            self._manifest = Manifest(folder, header, sources, resumed=resume)
        return self._journal

    def make_sinks(self, make: Callable[[Collection[str]], list[Sink]], formats: Collection[str]) -> list[Sink]:
        """The sinks of this process's part: one of several only draws."""
        if self.count == 1:
            return make(formats)
        self._make = lambda: make(formats)
        return [_Unfinished(sink) for sink in make([name for name in formats if name in DRAWN])]

    def join(self, folder: Path, header: RunHeader, inputs: Sequence[Input], summary: RunSummary) -> RunSummary:
        """Wait for the others; the main process then writes the tables of the whole run, and gives its counts.

        Raises DeviceError where another has gone, and OutputError.
        """
        if self._ranks is None:
            return summary
        unfinished = sum(self._ranks.gather(summary.unfinished))
        if unfinished:
            summary.unfinished = unfinished
        elif self.is_main:
            from ddetr_cli.detect.journal import JOURNAL_FILE, Finished
            from ddetr_cli.detect.merge import replay, write_journal
            from ddetr_cli.detect.session import journals_in

            journals = journals_in(folder)
            finished = Finished(journals)
            seconds = summary.seconds
            summary = replay(finished, header.positions, self._make(), inputs)
            summary.seconds = seconds
            write_journal(folder / JOURNAL_FILE, header, finished)
            for path in journals:
                if path.name != JOURNAL_FILE:
                    path.unlink()
        return summary

    def close(self, summary: RunSummary | None, *, skipped: int) -> None:
        """Close the journal, and say in run.json how it ended."""
        if self._journal is not None:
            self._journal.close()
        if self._manifest is not None:
            self._manifest.close(summary, skipped=skipped)

    def _wait(self) -> None:
        if self._ranks is not None:
            self._ranks.gather(None)


class _Unfinished:
    """A sink whose end is not this process's to declare."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    @property
    def render(self) -> Callable[[ImageResult, Image.Image], bytes] | None:
        return self._sink.render

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        self._sink.add(result, rendered)

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        self._sink.abandon()


@contextmanager
def open_processes(device: str) -> Iterator[Processes]:
    """The processes of this run, as torchrun's environment (RANK, WORLD_SIZE ...) tells; by default one.

    Raises UsageError and DeviceError.
    """
    with ExitStack() as stack:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            yield Processes(stack, device)
            return
        import torch

        from ddetr_cli.distributed import device_name, open_ranks

        # Gloo, whatever the device: they only meet at the beginning and the end.
        ranks = stack.enter_context(open_ranks(torch.device("cpu"), patience=_PATIENCE))
        yield Processes(stack, device_name(device), ranks)


def merge_shards(folders: Sequence[Path], output: Path, *, overwrite: bool, quiet: bool) -> None:
    """``ddetr detect --merge``: the files of one run, in ``output``, of the shards in ``folders``."""
    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.journal import JOURNAL_FILE
    from ddetr_cli.detect.manifest import Manifest
    from ddetr_cli.detect.merge import gather_pictures, read_parts, replay, write_journal
    from ddetr_cli.detect.session import own_folder
    from ddetr_cli.detect.sinks.assemble import make_sinks
    from ddetr_cli.detect.sinks.output import prepare_output
    from ddetr_cli.detect.sinks.sheet import thumbnail_reader

    header, finished = read_parts(folders)
    prepare_output(output, [], overwrite=overwrite, formats=header.formats)
    with own_folder(output):
        manifest = Manifest(output, header, [str(folder) for folder in folders], resumed=False)
        summary = None
        try:
            classes = ClassTable.from_json(header.classes)
            thumbnails = thumbnail_reader(**{key: header.options[key] for key in ("max_pixels", "allow_truncated")})
            sinks = make_sinks(output, header.formats, classes, header.info, read=thumbnails)
            gather_pictures(folders, output)
            summary = replay(finished, header.positions, sinks)
            write_journal(output / JOURNAL_FILE, header, finished)
        finally:
            manifest.close(summary)
    if not quiet:
        console.say(
            f"merged {len(folders)} shards: processed {summary.processed}, failed {summary.failed}, "
            f"{summary.detections} detections"
        )
        console.say(f"results in {output}")
    if code := exit_code(summary):
        raise typer.Exit(code)
