"""The record of where a measurement was taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ddetr_cli.bench.machine import available_cores, cpu_name, describe_machine, describe_versions


def test_the_processor_is_named_as_it_names_itself(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example CPU @ 2.00GHz\nmodel name\t: Other\n")
    assert cpu_name(cpuinfo) == "Example CPU @ 2.00GHz"


def test_a_system_without_cpuinfo_still_gets_a_name(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "absent")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to cores")
def test_cores_are_those_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_the_machine_says_how_many_threads_torch_uses() -> None:
    found = describe_machine(torch.device("cpu"))
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    assert found["gpu"] is None


def test_versions_name_ddetr_python_and_torch() -> None:
    versions = describe_versions()
    assert {"ddetr", "python", "torch"} <= set(versions)
    assert versions["torch"] == torch.__version__
