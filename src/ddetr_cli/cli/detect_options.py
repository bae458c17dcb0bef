"""What the options of ``ddetr detect`` mean that are more than one value. Light: imports nothing heavy."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from ddetr_cli.detect.sinks.formats import FORMATS
from ddetr_cli.errors import UsageError


def read_lists(sources: list[str], list_file: str | None, *, null: bool) -> tuple[list[str], list[str]]:
    """The sources that were named, and those in the lists. Raises UsageError."""
    from ddetr_cli.detect.sources import parse_list

    lists = [*(source for source in sources if source == "-"), *([] if list_file is None else [list_file])]
    if not sources and not lists:
        raise typer.BadParameter("none given. Give pictures, folders, or --list FILE.", param_hint="SOURCES")
    if null and not lists:
        raise UsageError("--null: only with a list (--list FILE, or - for stdin).")
    if lists.count("-") > 1:
        raise UsageError("'-': given twice, but stdin can be read once.")
    listed: list[str] = []
    for name in lists:
        try:
            data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        except (OSError, AttributeError) as error:
            raise UsageError(f"--list {name}: cannot be read ({error}). Give a file of paths.") from error
        listed += parse_list(data, null=null)
    return [source for source in sources if source != "-"], listed


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of ``--shard i/n``. Raises UsageError."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard {text!r}: not a part. Give I/N with I from 1 to N, as 3/7.")
    return int(number), int(count)


def parse_formats(text: str) -> frozenset[str]:
    """The names in ``--format``. Raises UsageError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise UsageError(f"--format {text!r}: unknown. Choose any of {', '.join(FORMATS)}.")
    return frozenset(names)
