"""The program ``ddetr``: its commands, and the one place where an error becomes a message and an exit code.

Plugging in a command: ``cli/<command>.py`` defines one function whose parameters are
``Annotated[..., typer.Option/Argument(help=...)]`` and whose docstring is the help text; its (command, function)
pair stands in COMMANDS. The module imports only typer and light things at its top; torch, PIL, numpy, pycocotools,
rich and tqdm inside the function. It
- returns None for exit 0, raises a DdetrError for a failure, ``typer.Exit(3)`` where only some inputs failed;
- talks through ``console.say / say_warning / show / Progress`` (stderr), gives results by ``console.write_result``;
- refuses a bad option value with ``typer.BadParameter`` or UsageError before anything heavy is imported;
- long work polls ``console.StopSignals``.
Tests call ``main([...])``, which returns the exit code and never raises.
"""

from __future__ import annotations

import errno
import importlib
import logging
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ddetr_cli.cli import console
from ddetr_cli.cli.grouped import GroupedCommand
from ddetr_cli.errors import DdetrError
from ddetr_cli.inference.threads import share_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

# The order of the help page: (command, function in cli/<command>.py).
COMMANDS: tuple[tuple[str, str], ...] = (
    ("detect", "detect"),
    ("train", "train"),
    ("eval", "evaluate"),
    ("bench", "bench"),
    ("export", "export"),
)

# A full or read-only disk met outside the code that expects it is still the output's fault, not a bug.
_OUTPUT_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

# \b: a block that is printed as it stands.
_EPILOG = "\b\nExit codes:\n" + "\n".join(f"{code:>3}  {meaning}" for code, meaning in console.EXIT_CODES.items())

app = typer.Typer(
    name="ddetr",
    help="Find objects in pictures with Deformable DETR: detect, train, evaluate, measure.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,  # importing rich would take most of the time of --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass
class Session:
    """What the global options set for one run of the program."""

    debug: bool = False


def _print_version(wanted: bool) -> None:
    if wanted:
        from ddetr_cli.versions import version_text

        console.write_result(version_text().rstrip("\n") + "\n", sole_output=True)
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print versions and built kernels, then exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="DDETR_DEBUG", help="Show the Python traceback of an error.")
    ] = False,
) -> None:
    context.ensure_object(Session).debug = debug
    if debug:
        # Tracebacks of failures that were survived: the library logs those at this level.
        warnings.simplefilter("default")
        handler = logging.StreamHandler(console.talk)
        handler.addFilter(lambda record: record.levelno == logging.DEBUG)
        logging.getLogger("ddetr_cli").addHandler(handler)
        logging.getLogger("ddetr_cli").setLevel(logging.DEBUG)


for _command, _function in COMMANDS:
    _module = importlib.import_module(f"ddetr_cli.cli.{_command}")
    app.command(_command, cls=GroupedCommand)(getattr(_module, _function))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ddetr`` on ``arguments`` (default: the process's own) and give its exit code; reports every error."""
    session = Session()
    share_cores()
    with console.plain_talk():
        try:
            with console.sigterm_unwinds(), console.own_warnings_only():
                return _run(arguments, session)
        except console.Terminated:
            console.say_error("stopped by SIGTERM.")
            return 143
        except KeyboardInterrupt:
            console.say_error("stopped by Ctrl-C.")
            return 130


def _run(arguments: Sequence[str] | None, session: Session) -> int:
    try:
        # With standalone_mode off Typer returns the code of typer.Exit and the command's None.
        code = typer.main.get_command(app).main(
            args=None if arguments is None else list(arguments), prog_name="ddetr", standalone_mode=False, obj=session
        )
        sys.stdout.flush()
        if code in (130, 143):  # StopSignals' codes, and what Typer makes of Ctrl-C
            console.say_error("stopped by Ctrl-C." if code == 130 else "stopped by SIGTERM.")
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        return _report_usage(error)
    except typer.Abort:
        console.say_error("stopped by Ctrl-C.")
        return 130
    except (console.StdoutClosed, BrokenPipeError):
        console.discard_stdout()
        return 141
    except SystemExit as error:
        # Typer answers a closed pipe with exit 1 before we see it.
        if isinstance(error.__context__, BrokenPipeError):
            console.discard_stdout()
            return 141
        return error.code if isinstance(error.code, int) else 1
    except Exception as error:
        code = _report(error)
        if session.debug:
            console.talk.write("".join(traceback.format_exception(error)))
        return code


def _report(error: Exception) -> int:
    """Say in one line what ended the program, and give the exit code for it."""
    if isinstance(error, DdetrError):
        console.say_error(str(error))
        return error.exit_code
    if isinstance(error, MemoryError):
        console.say_error("memory: exhausted. Use smaller images (--image-size) or a smaller --batch-size.")
        return 8
    if isinstance(error, OSError) and error.errno in _OUTPUT_ERRNOS:
        name = error.filename or "output"
        console.say_error(f"{name}: not written ({error.strerror}). Free space and run again.")
        return 7
    if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):  # torch's, without importing torch
        console.say_error(f"device: {error}. Use --device cpu, or smaller images and batches.")
        return 8
    console.say_error(
        f"internal error: {type(error).__name__}: {error} (a bug in ddetr). Run with ddetr --debug and report it."
    )
    return 1


def _report_usage(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    if context is not None:
        console.say(context.get_usage())
        if not error.format_message():
            return error.exit_code
    console.say_error(" ".join(error.format_message().split()))  # Typer lists choices over several lines
    console.say(f"Try '{'ddetr' if context is None else context.command_path} --help' for help.")
    return error.exit_code
