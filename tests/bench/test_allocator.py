"""Which allocator a measurement ran with, and starting again with another."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ddetr_cli.bench.allocator import TUNABLES, TUNED, allocator_settings, describe, environment_for

RUN = "import sys; from ddetr_cli.cli.app import main; sys.exit(main(sys.argv[1:]))"


def test_an_environment_without_settings_is_the_default() -> None:
    assert describe(allocator_settings({"PATH": "/bin", TUNABLES: ""})) == "default"


def test_our_settings_are_called_tuned_and_others_are_shown() -> None:
    assert describe(allocator_settings({TUNABLES: TUNED})) == "tuned"
    assert describe(allocator_settings({"LD_PRELOAD": "libjemalloc.so"})) == "LD_PRELOAD=libjemalloc.so"


def test_nothing_changes_where_the_allocator_is_the_wanted_one() -> None:
    assert environment_for("default", {"PATH": "/bin"}) is None
    assert environment_for("tuned", {"PATH": "/bin", TUNABLES: TUNED}) is None


def test_changing_the_allocator_keeps_the_rest_of_the_environment() -> None:
    mixed = {"PATH": "/bin", TUNABLES: "glibc.malloc.arena_max=1", "MALLOC_TOP_PAD_": "1"}
    assert environment_for("default", mixed) == {"PATH": "/bin"}
    assert environment_for("tuned", mixed) == {"PATH": "/bin", TUNABLES: TUNED}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_bench_starts_again_with_the_allocator_asked_for_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    arguments = ["bench", "--sizes", "--models", "tiny", "--image-size", "64", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments, "--allocator", "tuned", "--json", str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name not in (TUNABLES, "LD_PRELOAD")},
    )
    assert "allocator tuned" in done.stdout
    assert json.loads(path.read_text())["machine"]["allocator"] == {TUNABLES: TUNED}
