"""What ``ddetr train`` says while it runs: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Self

from ddetr_cli.cli import console
from ddetr_cli.printable import printable

if TYPE_CHECKING:
    from ddetr_cli.train.loop import Pace

# Plain lines come quickly while one still looks whether all is well, then seldom enough for a log of days.
FIRST_MINUTE, EARLY_SECONDS, LATER_SECONDS = 60.0, 10.0, 60.0

BOTTLENECKS = {"data": "waiting for pictures", "host": "waiting for Python", "device": ""}
HINTS = {"data": "more --workers or --cache may help", "host": "a larger --batch-size may help"}


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min`` or ``2 d 04 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


class TrainingProgress:
    """Steps with loss, pace, time left and what holds the run up, and one line for each epoch everywhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._start = time.monotonic()
        self._next_line = self._start + EARLY_SECONDS
        self._pace: Pace | None = None
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """One line, not said when quiet."""
        if not self._quiet:
            self._say(text)

    def warn(self, text: str) -> None:
        """One line, said in any case."""
        self._say(f"ddetr: warning: {text}")

    def pace(self, pace: Pace) -> None:
        """Remember how fast the run is."""
        self._pace = pace

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """Move the live line, or say a plain one now and then."""
        if self._quiet:
            return
        if console.is_interactive():
            self._show(epoch, step, steps, loss)
        elif time.monotonic() >= self._next_line and step < steps:
            is_early = time.monotonic() < self._start + FIRST_MINUTE
            self._next_line = time.monotonic() + (EARLY_SECONDS if is_early else LATER_SECONDS)
            console.say(", ".join([f"{self._epoch(epoch)}: {step} of {steps} steps", *self._state(loss)]))

    def epoch(self, row: dict[str, Any]) -> None:
        """One line with the epoch's loss and validation numbers."""
        if self._quiet:
            return
        parts = [self._epoch(row["epoch"]), f"loss {row.get('loss', math.nan):.3f}"]
        parts.append(f"{row['images_per_second']:.1f} images/s")
        if row["skipped_steps"]:
            parts.append(f"{row['skipped_steps']} steps skipped (loss not finite)")
        if "val" in row:
            parts += [
                f"{name} {'n/a' if row['val'][name] is None else format(row['val'][name], '.3f')}"
                for name in ("AP", "AP50", "APs", "APm", "APl")
            ]
        parts.append(duration(time.monotonic() - self._start))
        if self._pace is not None and self._pace.seconds_left is not None and row["epoch"] < self._pace.epochs:
            parts.append(f"{duration(self._pace.seconds_left)} left")
        if row["bottleneck"] in HINTS:
            parts.append(f"{BOTTLENECKS[row['bottleneck']]}: {HINTS[row['bottleneck']]}")
        self._say(", ".join(parts))

    def _epoch(self, epoch: int) -> str:
        return f"epoch {epoch}" if self._pace is None else f"epoch {epoch} of {self._pace.epochs}"

    def _state(self, loss: float) -> list[str]:
        """What there is to say about the step just done."""
        parts = [f"loss {loss:.3f}"]
        if self._pace is not None:
            parts.append(f"{self._pace.images_per_second:.1f} images/s")
            if self._pace.seconds_left is not None:
                parts.append(f"{duration(self._pace.seconds_left)} left")
            if BOTTLENECKS[self._pace.bottleneck]:
                parts.append(BOTTLENECKS[self._pace.bottleneck])
        return parts

    def _show(self, epoch: int, step: int, steps: int, loss: float) -> None:
        if self._live is None:
            from rich import progress

            self._live = progress.Progress(
                progress.TextColumn("{task.description}", style="bold"),
                progress.BarColumn(bar_width=None),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[state]}"),
                console=console.rich_console(),
                transient=True,
                refresh_per_second=4,
                # The console looks sys.stderr up at every write: redirected, it would write to itself.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._live.add_task("", total=steps, state="")
            self._live.start()
        self._live.update(
            self._task,
            description=self._epoch(epoch),
            completed=step,
            total=steps,
            state="  ".join(self._state(loss)),
            refresh=step == 1,  # at once; later ones when it is time
        )

    def _say(self, text: str) -> None:
        if self._live is None:
            console.say(text)
        else:
            self._live.console.print(printable(text), soft_wrap=True)  # above the live line
