"""What ``ddetr detect`` says: while it runs, and at its end."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ddetr_cli.cli import console

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.results import ImageResult, RunSummary
    from ddetr_cli.detect.selection import Selection
    from ddetr_cli.detect.sources import Inputs
    from ddetr_cli.weights import LoadedModel

_SHOWN_CLASSES = 20


class Report:
    """Tells stderr how a run over ``inputs`` goes; errors and warnings only when ``quiet``."""

    def __init__(self, classes: ClassTable, inputs: Inputs, *, quiet: bool, verbose: bool) -> None:
        self._classes = classes
        self._inputs = inputs
        self._quiet, self._verbose = quiet, verbose
        self._progress: console.Progress | None = None
        self._done = self._failed = 0

    def say_details(self, loaded: LoadedModel) -> None:
        """The model's tensors, the kernels in use, and what was passed over."""
        from ddetr_cli.ops import kernel_status

        for line in (*loaded.report.table(), *str(kernel_status()).splitlines()):
            console.say(line)
        for path, reason in self._inputs.skipped:
            console.say(f"{path}: skipped ({reason})")

    def say_resumed(self, done: int, count: int) -> None:
        """How much of it an earlier run has finished."""
        if not self._quiet:
            console.say(f"resumed: {done} of {count} images are finished already")

    @contextmanager
    def progress(self, total: int) -> Iterator[None]:
        """Progress over ``total`` images while the block runs."""
        console.tell("start", images=total)
        with (
            console.Progress(total, unit="images", description="detect", quiet=self._quiet) as self._progress,
            _notes_of_the_reader(self._progress, verbose=self._verbose),
        ):
            yield

    def add(self, result: ImageResult) -> None:
        """One more image is finished."""
        assert self._progress is not None
        self._done += 1
        self._failed += result.failure is not None
        console.tell("image", done=self._done, **_event(result))
        if result.failure is not None:
            self._progress.say(f"ddetr: error: {result.input.where}: {result.failure}")
        elif result.dropped:
            self._progress.say(
                f"ddetr: error: {result.input.where}: {result.dropped} detections dropped (not finite numbers). "
                "Use --precision fp32, or check the model."
            )
        if self._verbose and result.failure is None:
            self._progress.say(_line(result, self._classes))
        self._progress.advance()

    @property
    def failed(self) -> int:
        """How many images have failed since this process began."""
        return self._failed

    def end(self, summary: RunSummary, selection: Selection, folder: Path | None) -> None:
        """Counts, and where the results are."""
        counts = {"processed": summary.processed, "failed": summary.failed, "not_reached": summary.unfinished}
        console.tell("end", **counts, skipped=len(self._inputs.skipped), detections=summary.detections)
        if not self._quiet:
            _show_summary(summary, self._classes, selection)
        if not self._quiet or summary.failed:
            tail = f", not reached {summary.unfinished}" if summary.unfinished else ""
            skipped = len(self._inputs.skipped)
            console.say(f"processed {summary.processed}, failed {summary.failed}, skipped {skipped}{tail}")
        if not self._quiet and folder is not None:
            console.say(f"results in {folder}")


def _event(result: ImageResult) -> dict[str, Any]:
    """One finished image, for --json-progress."""
    values: dict[str, Any] = {"file_name": result.input.name, "image_id": result.image_id}
    if result.failure is not None:
        return {**values, "failed": result.failure}
    return {**values, "detections": len(result.labels), "seconds": round(result.seconds, 4)}


def exit_code(summary: RunSummary) -> int:
    """The program's exit code for a run that went through."""
    if summary.failed and not summary.processed:
        return 4
    return 3 if summary.failed or summary.dropped else 0


def _line(result: ImageResult, classes: ClassTable) -> str:
    """One line on one finished image, for -v."""
    counts: dict[str, int] = {}
    for label in result.labels:
        counts[classes.name(label)] = counts.get(classes.name(label), 0) + 1
    found = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    width, height = result.size_wh or (0, 0)
    return f"{result.input.where}: {width}x{height}, {found or 'nothing'}, {result.seconds:.2f} s"


def _show_summary(summary: RunSummary, classes: ClassTable, selection: Selection) -> None:
    from rich.table import Table
    from rich.text import Text

    from ddetr_cli.detect.results import class_counts
    from ddetr_cli.printable import printable

    images = f"{summary.processed} image{'' if summary.processed == 1 else 's'}"
    done = summary.processed - summary.resumed
    pace = f", {summary.seconds / done:.2f} s each" if done > 0 else ""
    table = Table()
    own = "".join(f", {printable(classes.name(i))} {value:g}" for i, value in sorted(selection.thresholds.items()))
    table.add_column(Text(f"class (score >= {selection.threshold:g}{own})"))
    table.add_column("count", justify="right")
    counts = class_counts(summary, classes)
    for name, count in counts[:_SHOWN_CLASSES]:
        table.add_row(Text(printable(name)), str(count))
    if len(counts) > _SHOWN_CLASSES:
        rest = counts[_SHOWN_CLASSES:]
        table.add_row(f"{len(rest)} more classes", str(sum(count for _, count in rest)))
    if not counts:
        table.add_row("nothing found", "0")
    console.say(f"{summary.detections} detections in {images}, {summary.seconds:.1f} s{pace}")
    console.show(table)


@contextmanager
def _notes_of_the_reader(progress: console.Progress, *, verbose: bool) -> Iterator[None]:
    """With -v, what the library notes about single files (several frames, damaged EXIF) appears on stderr."""
    if not verbose:
        yield
        return

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.INFO:
                progress.say(f"ddetr: note: {record.getMessage()}")

    logger, handler = logging.getLogger("ddetr_cli"), Handler(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
