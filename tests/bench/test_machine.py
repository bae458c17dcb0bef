"""The record of where a measurement was taken."""

from __future__ import annotations

import mmap
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ddetr_cli.bench.machine import (
    cpu_name,
    describe_machine,
    describe_versions,
    peer_versions,
    resident_bytes,
    source_commit,
)


def test_the_processor_is_named_as_it_names_itself(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example CPU @ 2.00GHz\nmodel name\t: Other\n")
    assert cpu_name(cpuinfo) == "Example CPU @ 2.00GHz"


def test_a_system_without_cpuinfo_still_gets_a_name(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "absent")


def test_the_machine_says_how_many_threads_torch_uses() -> None:
    found = describe_machine(torch.device("cpu"))
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    assert found["gpu"] is None


def test_versions_name_ddetr_python_and_torch() -> None:
    versions = describe_versions()
    assert {"ddetr", "python", "torch"} <= set(versions)
    assert versions["torch"] == torch.__version__


def test_peers_that_are_not_installed_have_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "openvino":
            raise metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(metadata, "version", version)
    found = peer_versions()
    assert found["openvino"] == "1.2"
    assert found["onnxruntime"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_clone_marked_where_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert source_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert source_commit(tmp_path) == commit
    (tmp_path / "src" / "a.py").write_text("2")
    assert source_commit(tmp_path) == commit + "+"


def test_resident_memory_grows_by_what_is_written_to() -> None:
    before = resident_bytes()
    # A mapping of its own: an allocator may have room left from earlier tests.
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(b"x" * (64 << 20))
        assert resident_bytes() - before > 48 << 20


def test_without_proc_the_peak_stands_for_resident_memory(tmp_path: Path) -> None:
    assert resident_bytes(tmp_path / "absent") > 1 << 20
