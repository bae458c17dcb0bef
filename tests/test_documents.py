"""What README, CONTRIBUTING and Makefile say, held against the program."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ddetr_cli.cli import console
from ddetr_cli.presets import PRESETS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "examples/README.md")


def shell_lines(document: str) -> list[str]:
    """Every command in the ``sh`` blocks of a document, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def options_of(command: str) -> set[str]:
    """The options ``ddetr <command>`` has."""
    import typer

    from ddetr_cli.cli.app import app

    group = typer.main.get_command(app)
    found = group.commands[command]  # type: ignore[attr-defined]
    return {option for parameter in found.params for option in parameter.opts}


def ddetr_calls() -> list[tuple[str, str, list[str]]]:
    calls = []
    for document in DOCUMENTS:
        for line in shell_lines(document):
            match = re.match(r"(?:\w+=\S+ )*ddetr (\w+) (.*)", line)
            if match:
                calls.append((document, match[1], re.findall(r"(?<!\S)--[a-z-]+", match[2])))
    return calls


def test_documents_show_every_command() -> None:
    assert {command for _, command, _ in ddetr_calls()} == {"detect", "train", "eval", "bench"}


@pytest.mark.parametrize(("document", "command", "options"), ddetr_calls())
def test_commands_in_documents_use_options_that_exist(document: str, command: str, options: list[str]) -> None:
    assert set(options) <= options_of(command), document


@pytest.mark.parametrize("command", ["detect", "train", "eval"])
def test_option_tables_of_the_readme_name_options_that_exist(command: str) -> None:
    text = (ROOT / "README.md").read_text()
    section = text.split(f"### {command}\n")[1].split("\n### ")[0]
    cells = re.findall(r"^\| (`--.*?) \|", section, flags=re.MULTILINE)
    named = {option for cell in cells for option in re.findall(r"`(--[a-z-]+)[ `]", cell)}
    assert len(named) >= 6
    assert named <= options_of(command)


def test_the_readme_lists_every_exit_code_with_the_words_of_the_help() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == console.EXIT_CODES


def test_the_readme_names_every_preset() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in PRESETS)


def test_the_tests_that_the_table_of_faults_names_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "tests/README.md").read_text())
    assert len(named) > 80
    sources = {path: (ROOT / "tests" / path).read_text() for path, _ in named}
    assert [f"{path}::{name}" for path, name in named if f"def {name}(" not in sources[path]] == []


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {m[1] for d in DOCUMENTS for line in shell_lines(d) if (m := re.match(r"make ([a-z-]+)", line))}
    assert {"demo", "test", "test-all", "lint", "bench"} <= named
    assert named <= targets


def test_links_between_documents_lead_somewhere() -> None:
    for document in (*DOCUMENTS, "CHANGELOG.md"):
        folder = (ROOT / document).parent
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
            assert target.startswith("https://") or (folder / target).exists(), f"{document}: {target}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("target", "stamp"), [("demo", ".installed"), ("test", ".installed-test")])
def test_make_installs_nothing_while_its_stamps_are_newer_than_the_sources(
    target: str, stamp: str, tmp_path: Path
) -> None:
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    source = tmp_path / "src" / "ddetr_cli" / "a.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text("")

    def planned() -> str:
        return subprocess.run(
            ["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout  # fmt: skip

    assert "pip install" in planned()
    (tmp_path / ".venv" / stamp).write_text("")
    assert "pip install" not in planned()
    later = (tmp_path / ".venv" / stamp).stat().st_mtime + 10

    os.utime(source, (later, later))
    assert "pip install" in planned()


def test_the_ci_script_is_executable_and_demands_the_native_library() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    lines = script.read_text().splitlines()
    assert "export DDETR_REQUIRE_NATIVE=1" in lines
    assert [line for line in lines if line.startswith("make ")] == ["make lint", "make test", "make test-all"]
