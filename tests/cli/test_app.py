from __future__ import annotations

import errno
import inspect
import os
import resource
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import typer

from ddetr_cli import errors
from ddetr_cli.cli import app as app_module
from ddetr_cli.cli import console
from ddetr_cli.cli.app import COMMANDS, app, main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RUN = "import sys; from ddetr_cli.cli.app import main; sys.exit(main())"


def ddetr(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def failing_command() -> Iterator[Callable[[BaseException], None]]:
    """Registers a command ``fail`` that raises what it is given, and takes it away again."""
    raised: list[BaseException] = []

    def fail() -> None:
        raise raised[0]

    app.command("fail")(fail)
    yield raised.append
    app.registered_commands.pop()


def test_help_and_version_work_without_torch_and_import_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'PIL', 'numpy', 'pycocotools', 'scipy'): sys.modules[name] = None\n"
        "before = set(sys.modules)\n"
        "from ddetr_cli.cli.app import main\n"
        "from ddetr_cli.cli.app import COMMANDS\n"
        "pages = [['--help'], ['--version'], *([command, '--help'] for command, _ in COMMANDS)]\n"
        "codes = [main(page) for page in pages]\n"
        "assert 'tqdm' not in sys.modules and 'click' not in sys.modules\n"
        "sys.exit(max(codes))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    ddetr("--help")  # the first run may have to compile
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ddetr("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # Processor time, the best of three: the wall clock would measure whatever else this machine is doing.
    assert min(spent) < 0.5


def test_help_names_the_four_commands_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("detect", "train", "eval", "bench"):
        assert command in text
    for code, meaning in console.EXIT_CODES.items():
        assert f"{code}  {meaning}" in text


def test_every_exit_code_of_an_error_is_in_the_table() -> None:
    codes = {
        cls.exit_code for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.DdetrError)
    }
    assert codes <= set(console.EXIT_CODES)


def test_every_option_of_every_command_has_help_text() -> None:
    group = typer.main.get_command(app)
    for command in (group, *group.commands.values()):  # type: ignore[attr-defined]
        assert command.help
        for parameter in command.params:
            assert parameter.help, f"{command.name}: {parameter.name}"


def test_the_commands_are_those_of_the_contract() -> None:
    assert [command for command, _ in COMMANDS] == ["detect", "train", "eval", "bench", "export"]


def test_nothing_at_all_shows_the_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "Usage: ddetr" in captured.out + captured.err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["detct"], "Did you mean 'detect'?"),
        (["detect", "x.jpg", "--treshold", "0.3"], "--threshold"),
        (["detect"], "none given"),
        (["detect", "x.jpg", "--threshold"], "requires an argument"),
        (["--frobnicate"], "No such option: --frobnicate"),
    ],
)
def test_wrong_usage_exits_2_with_a_suggestion(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "ddetr: error: " in captured.err
    assert hint in captured.err
    assert "--help' for help." in captured.err


@pytest.mark.parametrize(
    "cls", [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.DdetrError)]
)
def test_an_expected_failure_is_one_line_and_its_own_exit_code(
    cls: type[errors.DdetrError], failing_command: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing_command(cls("a\x1b.jpg: broken (why). Do this."))
    assert main(["fail"]) == cls.exit_code
    assert capsys.readouterr() == ("", "ddetr: error: a\\x1b.jpg: broken (why). Do this.\n")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RuntimeError("surprise"), 1, "internal error: RuntimeError: surprise (a bug in ddetr)"),
        (OSError(errno.ENOENT, "No such file or directory"), 1, "internal error: FileNotFoundError"),
        (OSError(errno.ENOSPC, "No space left on device"), 7, "not written (No space left on device)"),
        (OSError(errno.EROFS, "Read-only file system"), 7, "not written (Read-only file system)"),
        (MemoryError(), 8, "memory: exhausted"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (console.Terminated(), 143, "stopped by SIGTERM"),
    ],
)
def test_every_other_end_has_its_code_and_one_line(
    error: BaseException,
    code: int,
    text: str,
    failing_command: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing_command(error)
    assert main(["fail"]) == code
    err = capsys.readouterr().err.strip()
    assert text in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_running_out_of_gpu_memory_exits_8(
    failing_command: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    failing_command(torch.OutOfMemoryError("CUDA out of memory"))
    assert main(["fail"]) == 8
    assert "device: CUDA out of memory" in capsys.readouterr().err


def test_a_code_given_by_the_command_is_the_exit_code(failing_command: Callable[[BaseException], None]) -> None:
    failing_command(typer.Exit(3))
    assert main(["fail"]) == 3


@pytest.mark.parametrize("error", [console.StdoutClosed(), BrokenPipeError(errno.EPIPE, "Broken pipe")])
def test_a_closed_stdout_exits_141_without_a_word(
    error: BaseException,
    failing_command: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "discard_stdout", lambda: None)  # pytest needs its own
    stdout, stderr = sys.stdout, sys.stderr
    failing_command(error)
    assert main(["fail"]) == 141
    monkeypatch.setattr(sys, "stdout", stdout)  # Typer wraps both when it meets a broken pipe
    monkeypatch.setattr(sys, "stderr", stderr)
    assert capsys.readouterr().err == ""


def test_debug_adds_the_traceback(
    failing_command: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing_command(RuntimeError("surprise"))
    assert main(["--debug", "fail"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.setenv("DDETR_DEBUG", "1")
    assert main(["fail"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_sigterm_outside_a_loop_exits_143_instead_of_killing_the_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    app.command("terminate")(terminate)
    try:
        assert main(["terminate"]) == 143
    finally:
        app.registered_commands.pop()
    assert capsys.readouterr().err == "ddetr: error: stopped by SIGTERM.\n"


def test_a_closed_pipe_ends_help_with_141_and_no_traceback() -> None:
    script = f'set -o pipefail; "$0" -c "{RUN}" --help | head -c 1 >/dev/null'
    # head leaves at once; the pipe is then closed before, while or after ddetr writes its last line
    done = subprocess.run(["bash", "-c", script, sys.executable], capture_output=True, text=True)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


def test_the_program_works_optimised_with_warnings_as_errors_and_in_the_c_locale() -> None:
    environment = {
        **os.environ,
        "PYTHONWARNINGS": "error",
        "LC_ALL": "C",
        "LANG": "C",
        "COLUMNS": "1",
        "TERM": "dumb",
    }
    done = subprocess.run(
        [sys.executable, "-O", "-c", RUN, "detect", "no\nsuch.jpg"],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ddetr: error: no\\nsuch.jpg: no such file or folder. Check the path.\n"


def test_a_script_under_set_e_and_xargs_see_the_failure() -> None:
    script = (
        f'printf "no-such.jpg" | xargs "$0" -c "{RUN}" detect 2>/dev/null || echo "xargs $?"; '
        f'set -e; "$0" -c "{RUN}" detect no-such.jpg 2>/dev/null; echo not reached'
    )
    done = subprocess.run(["bash", "-c", script, sys.executable], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "xargs 123\n")  # xargs' own code for "a command exited 1 to 125"


def test_typers_own_copy_of_click_is_the_only_one_used() -> None:
    sources = app_module.__file__.rsplit("/cli/", 1)[0]
    found = subprocess.run(["grep", "-rnE", "^ *(import|from) click", sources], capture_output=True, text=True)
    assert found.stdout == ""
