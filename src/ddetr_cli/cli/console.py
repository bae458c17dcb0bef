"""What the terminal sees: talk on stderr, results on stdout, progress, exit codes and signals.

Nothing here imports torch, and rich and tqdm are imported only when something is drawn with them.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

from ddetr_cli.errors import OutputError
from ddetr_cli.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from rich.console import Console, RenderableType

EXIT_CODES: dict[int, str] = {
    0: "all done",
    1: "internal error (a bug; --debug shows the traceback)",
    2: "wrong usage",
    3: "finished, but some inputs failed; each is named",
    4: "nothing usable: no image found, or every one failed",
    5: "checkpoint or model file refused",
    6: "data set refused",
    7: "output cannot be written",
    8: "device or memory",
    9: "training diverged",
    130: "stopped by Ctrl-C (SIGINT)",
    141: "stdout closed early, and it was the only output",
    143: "stopped by SIGTERM, finished work saved",
}

# Of tables among the results.
RESULT_WIDTH = 120

# Plain progress (no terminal) is for log files: a line now and then, not one per image.
PLAIN_PROGRESS_SECONDS = 10.0


class Terminated(BaseException):
    """SIGTERM arrived where no StopSignals was listening; unwinds the stack so that temporary files go."""


class StdoutClosed(Exception):
    """The reader of stdout has gone and stdout was the only output; ends the program with 141."""


class _Talk:
    """stderr as a text file that a vanished reader (``2>&1 | head -1``) cannot turn into an exception."""

    # sys.stderr is looked up at every call: test runners and Typer's replace it.
    def write(self, text: str) -> int:
        with suppress(BrokenPipeError, ValueError, AttributeError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(BrokenPipeError, ValueError, AttributeError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        try:
            return sys.stderr.isatty()
        except (AttributeError, ValueError):  # closed, or None where the file descriptor was closed at the start
            return False

    def fileno(self) -> int:
        if sys.stderr is None:
            raise OSError(errno.EBADF, "stderr is closed")
        return sys.stderr.fileno()

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "utf-8"


talk = _Talk()


class _Form:
    """In which form stderr is written."""

    is_json = False


@contextmanager
def plain_talk() -> Iterator[None]:
    """Within, stderr takes plain lines, until ``talk_json`` says otherwise; after, as before."""
    before, _Form.is_json = _Form.is_json, False
    try:
        yield
    finally:
        _Form.is_json = before


def talk_json() -> None:
    """From now on every line on stderr is one JSON object with an ``event``; whatever else is said is a "message"."""
    _Form.is_json = True


def tell(event: str, **values: Any) -> None:
    """One event on stderr, where it takes JSON; nothing elsewhere."""
    if _Form.is_json:
        talk.write(json.dumps({"event": event, **values}) + "\n")
        talk.flush()


def is_interactive() -> bool:
    """Whether stderr is a terminal that understands cursor movement; if not, output is plain lines."""
    return not _Form.is_json and talk.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def say(text: str) -> None:
    """One line on stderr, whatever is in ``text``."""
    if _Form.is_json:
        tell("message", text=text)
        return
    talk.write(printable(text) + "\n")
    talk.flush()


def say_error(text: str) -> None:
    """``ddetr: error: <text>``, the one form every failure is reported in."""
    say(f"ddetr: error: {text}")


def say_warning(text: str) -> None:
    """``ddetr: warning: <text>``."""
    say(f"ddetr: warning: {text}")


def rich_console(*, stdout: bool = False) -> Console:
    """A rich console on stderr (or stdout) that takes text as it is: no markup, emoji codes or highlights."""
    from rich.console import Console

    file: Any = sys.stdout if stdout else talk  # rich asks less of a file than typing.IO
    console = Console(file=file, markup=False, emoji=False, highlight=False, soft_wrap=False)
    if not console.is_terminal or console.width < 60:
        # A log file has no width, and COLUMNS=1 would print a table one letter per line.
        console = Console(file=file, markup=False, emoji=False, highlight=False, width=max(console.width, 100))
    return console


def show(renderable: RenderableType) -> None:
    """A rich table or text on stderr; nothing where that takes JSON."""
    if _Form.is_json:
        return
    rich_console().print(renderable)
    talk.flush()


def render(renderable: RenderableType, width: int = RESULT_WIDTH) -> str:
    """A rich table or text as plain text of at most ``width`` columns, for ``write_result``."""
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, markup=False, emoji=False, highlight=False, width=width, color_system=None).print(renderable)
    return buffer.getvalue()


def write_result(text: str, *, sole_output: bool) -> None:
    """Write ``text`` to stdout, where results go, and flush it.

    When the reader has gone: StdoutClosed (exit 141) if stdout was the ``sole_output``, else nothing, because the
    files are complete. Raises OutputError when stdout is a full or broken device.
    """
    with _stdout_errors(sole_output=sole_output):
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding or "ascii"
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


class StdoutFile:
    """stdout as the one file of results: what is written comes out at once. Errors are those of ``write_result``."""

    def write(self, data: bytes) -> None:
        """Send ``data``."""
        with _stdout_errors(sole_output=True):
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def commit(self, *, durable: bool) -> None:
        """Nothing is left to do."""

    def abandon(self) -> None:
        """What was sent cannot be taken back."""


@contextmanager
def _stdout_errors(*, sole_output: bool) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        discard_stdout()
        if sole_output:
            raise StdoutClosed from error
    except OSError as error:
        discard_stdout()
        raise OutputError(f"stdout: not written ({error.strerror}). Send it somewhere that has room.") from error


def discard_stdout() -> None:
    """Point stdout at the null device, so that the interpreter's last flush cannot fail again."""
    with suppress(OSError, ValueError, AttributeError, io.UnsupportedOperation):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class Progress:
    """A progress bar on a terminal, a plain line every ten seconds elsewhere, nothing when ``quiet``.

    Use as a context manager; ``say`` prints a line without tearing the bar.
    """

    def __init__(self, total: int, *, unit: str, description: str = "", quiet: bool = False) -> None:
        self.total, self.unit, self.description = total, unit, description
        self.done = 0
        self._quiet = quiet
        self._bar: Any = None
        self._next_line = time.monotonic() + PLAIN_PROGRESS_SECONDS

    def __enter__(self) -> Self:
        if not self._quiet and is_interactive():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, unit=f" {self.unit}", desc=self.description or None, file=talk, dynamic_ncols=True,
                leave=False,
            )  # fmt: skip
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def extend(self, count: int) -> None:
        """``count`` more are to be done than known at the start."""
        self.total += count
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def advance(self, count: int = 1) -> None:
        """``count`` more are finished."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not (self._quiet or _Form.is_json) and time.monotonic() >= self._next_line and self.done < self.total:
            self._next_line = time.monotonic() + PLAIN_PROGRESS_SECONDS
            say(f"{self.description + ': ' if self.description else ''}{self.done} of {self.total} {self.unit}")

    def say(self, text: str) -> None:
        """One line on stderr, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        say(text)
        if self._bar is not None:
            self._bar.refresh()


class StopSignals:
    """The first SIGINT or SIGTERM asks the work to stop at its next safe point; a second one stops it at once.

    Those that follow within ``grace`` seconds count as the first.

    ``with StopSignals() as stop:`` then poll ``stop.requested`` between images or steps, save, and end with
    ``raise typer.Exit(stop.exit_code)``. Outside the main thread, where Python cannot listen, it never fires.
    """

    def __init__(
        self, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM), *, grace: float = 0.0
    ) -> None:
        self.received: signal.Signals | None = None
        self._grace, self._received_at = grace, 0.0
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 130 or 143."""
        return 128 + int(self.received) if self.received is not None else 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                # A job a script starts with & ignores SIGINT; it must go on doing so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at < self._grace:
                return
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.received, self._received_at = signal.Signals(number), time.monotonic()
        # A plain write: the interrupted code may hold the bar's lock.
        text = "stopping at the next safe point; once more stops at once"
        line = json.dumps({"event": "message", "text": text}) if _Form.is_json else f"\nddetr: {text}"
        with suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), f"{line}\n".encode())


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated instead of killing the process outright, so cleanup runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def own_warnings_only() -> Iterator[None]:
    """Inside, Python warnings that start with ``ddetr:`` appear as ours; other libraries' appear with --debug only.

    It also keeps PYTHONWARNINGS=error from turning a library's remark into a failure, and Pillow's log records about
    damaged files off stderr, where each such file has its one line already.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = str(message)
        say_warning(text.removeprefix("ddetr: "))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="ddetr: ")
        warnings.showwarning = show
        yield
