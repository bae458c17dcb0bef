from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest
from rich.table import Table

from ddetr_cli.cli import console
from ddetr_cli.errors import OutputError
from ddetr_cli.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name.jpg", "plain name.jpg"),
        ("Ärger 猫 😀.jpg", "Ärger 猫 😀.jpg"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b31m", "\\x9b31m"),
        (os.fsdecode(b"bad\xff.jpg"), "bad\\xff.jpg"),
        ("\ud800", "\\ud800"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("a\u2028b", "a\\u2028b"),
        ("", ""),
    ],
)
def test_text_of_unknown_origin_cannot_act_on_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_line_is_one_line_on_stderr_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    console.say_error("a\nb\x1b[2J")
    assert capsys.readouterr() == ("", "ddetr: error: a\\nb\\x1b[2J\n")


def test_a_table_without_a_terminal_has_no_control_codes_and_reads_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1")
    table = Table("class", "count")
    table.add_row("[red]not markup[/red] :cat:", "3")
    console.show(table)
    text = capsys.readouterr().err
    assert "[red]not markup[/red] :cat:" in text
    assert "\x1b" not in text


def test_a_result_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console.write_result("numbers\n", sole_output=True)
    assert capsys.readouterr() == ("numbers\n", "")


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_of_stdout_that_left_matters_only_where_stdout_was_the_sole_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    console.write_result("numbers\n", sole_output=False)
    with pytest.raises(console.StdoutClosed):
        console.write_result("numbers\n", sole_output=True)


def test_a_reader_of_stderr_that_left_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", ClosedPipe())
    console.say("talk")
    monkeypatch.setattr(sys, "stderr", None)
    console.say("talk")
    assert not console.is_interactive()


def test_stdout_on_a_full_device_is_an_output_error() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    program = "import sys; from ddetr_cli.cli.app import main; sys.exit(main(['--version']))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == OutputError.exit_code
    assert (
        done.stderr
        == "ddetr: error: stdout: not written (No space left on device). Send it somewhere that has room.\n"
    )


def test_a_result_that_the_encoding_cannot_say_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.write_result("猫\n", sole_output=True)
    assert raw.getvalue() == b"\\u732b\n"


def test_progress_without_a_terminal_is_a_plain_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with console.Progress(100, unit="images", description="detect") as progress:
        for _ in range(100):
            clock[0] += 0.25
            progress.advance()
    assert capsys.readouterr().err == "detect: 40 of 100 images\ndetect: 80 of 100 images\n"


def test_quiet_progress_says_nothing_but_what_it_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_PROGRESS_SECONDS", 0.0)
    with console.Progress(3, unit="images", quiet=True) as progress:
        progress.advance()
        progress.say("a.jpg: bad")
    assert capsys.readouterr().err == "a.jpg: bad\n"


def test_progress_on_a_terminal_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "is_interactive", lambda: True)
    with console.Progress(3, unit="images") as progress:
        progress.advance()
        progress.say("a.jpg: bad")
    text = capsys.readouterr().err
    assert "0/3" in text
    assert "a.jpg: bad\n" in text


def test_a_dumb_terminal_is_not_interactive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(console.talk), "isatty", lambda self: True)
    for terminal, expected in (("xterm", True), ("dumb", False), ("", False)):
        monkeypatch.setenv("TERM", terminal)
        assert console.is_interactive() is expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_asks_and_the_second_one_stops(number: signal.Signals, code: int) -> None:
    # Whoever started the tests may have had SIGINT ignored: every job that a shell script puts into the background.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with console.StopSignals() as stop:
            assert not stop.requested
            assert stop.exit_code == 0
            os.kill(os.getpid(), number)
            assert stop.requested
            assert stop.exit_code == code
            with pytest.raises((KeyboardInterrupt, console.Terminated)):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_signal_the_shell_told_us_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with console.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    outcome: list[bool] = []

    def work() -> None:
        with console.StopSignals() as stop, console.sigterm_unwinds():
            outcome.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [False]


def test_our_warnings_are_lines_of_ours_and_those_of_libraries_are_silent_even_as_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with console.own_warnings_only():
            warnings.warn("ddetr: no native kernels", RuntimeWarning, stacklevel=1)
            warnings.warn("use something else", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "ddetr: warning: no native kernels\n"
