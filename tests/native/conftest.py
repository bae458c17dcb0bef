"""C++ programs built from a few files, some of which several tests share: each is compiled once for its flags."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from ddetr_cli.ops import kernels

Unit = tuple[Path, tuple[str, ...]]  # a file, and flags of its own


class Builder:
    """Compiles as many files at a time as there are cores, and links; keeps the object files."""

    def __init__(self, folder: Path, *, is_required: bool) -> None:
        self.folder, self.is_required = folder, is_required
        self.numbers = itertools.count()
        self.made: dict[tuple[str, ...], Path] = {}

    def build(
        self, units: Iterable[Unit], flags: list[str], to: Path, *, libraries: Iterable[str] = (), compiler: str = ""
    ) -> Path:
        """The program of ``units``, which all have ``flags`` too."""
        compiler = compiler or shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
        if compiler is None:
            self._lack("no C++ compiler")
        # Of what a debugger knows only the lines, for the reports of sanitizers: all of it doubles the time.
        commands = [(compiler, "-g1", *flags, *own, "-c", str(file)) for file, own in units]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = list(pool.map(self._compile, commands))
        objects = [str(self.made[command]) for command in commands if command in self.made]
        if not any(errors):
            command = [compiler, *flags, *objects, *libraries, "-o", str(to)]
            linked = subprocess.run(command, capture_output=True, text=True)
            errors = [linked.stderr] if linked.returncode != 0 else []
            if any("cannot find" in said for said in errors):
                self._lack(f"this compiler has no libraries for {' '.join(flags)}: {errors[0][:200]}")
        for said in filter(None, errors):
            if "unrecognized" in said and ("option" in said or "argument" in said):
                self._lack(f"this compiler has no {' '.join(flags)}: {said[:200]}")
            pytest.fail(said)
        return to

    def _lack(self, reason: str) -> NoReturn:
        """Skip, or fail where the native kernels are required: what built them builds these too."""
        if self.is_required:
            pytest.fail(reason)
        pytest.skip(reason)

    def _compile(self, command: tuple[str, ...]) -> str:
        """What the compiler says where it fails."""
        if command in self.made:
            return ""
        made = self.folder / f"{next(self.numbers)}-{Path(command[-1]).stem}.o"
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode == 0:
            self.made[command] = made
        return done.stderr if done.returncode != 0 else ""


@pytest.fixture(scope="session")
def builder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Builds C++ programs."""
    is_required = request.config.getoption("--require-native") or kernels.is_native_required()
    return Builder(tmp_path_factory.mktemp("objects"), is_required=is_required)
