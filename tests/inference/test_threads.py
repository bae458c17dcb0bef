from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from ddetr_cli.inference import threads
from ddetr_cli.inference.threads import available_cores, share_cores, use_available_cores

if TYPE_CHECKING:
    from pathlib import Path


def group(tmp_path: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    (tmp_path / "self").write_text(membership)
    return tmp_path / "cgroup", tmp_path / "self"


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),  # one and a half: two threads use it better than one
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {}, 8),  # the root of the machine has no such file
        ("0::/pod/app\n", {"cpu.max": "max 100000", "pod/cpu.max": "300000 100000", "pod/app/cpu.max": "max 1"}, 3),
        ("0::/docker/of-the-host\n", {"cpu.max": "100000 100000\n"}, 1),  # seen from within the container
        (
            "4:memory:/a\n3:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_the_quota_of_the_control_group_limits_the_cores(
    tmp_path: Path, membership: str, files: dict[str, str], cores: int
) -> None:
    assert available_cores(*group(tmp_path, membership, files), affinity=8) == cores


def test_a_quota_of_more_than_the_bound_cores_changes_nothing(tmp_path: Path) -> None:
    places = group(tmp_path, "0::/\n", {"cpu.max": "1600000 100000"})
    assert available_cores(*places, affinity=2) == 2


def test_a_system_without_control_groups_has_the_cores_it_is_bound_to(tmp_path: Path) -> None:
    assert available_cores(tmp_path, tmp_path / "none", affinity=3) == 3


def test_torch_computes_with_no_more_threads_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(6)
        monkeypatch.setattr(threads, "available_cores", lambda: 2)
        use_available_cores()
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(threads, "available_cores", lambda: 4)
        use_available_cores()
        assert torch.get_num_threads() == 2  # never more than torch chose
        torch.set_num_threads(6)
        monkeypatch.setenv("OMP_NUM_THREADS", "6")
        use_available_cores()
        assert torch.get_num_threads() == 6  # the user's own number stands
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind processes to cores")
def test_a_process_bound_to_one_core_computes_with_one_thread() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from ddetr_cli.inference.threads import available_cores, use_available_cores\n"
        "import torch; use_available_cores(); print(available_cores(), torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"], done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to cores")
def test_cores_are_those_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("load", "given", "count"),
    [
        (9.0, {}, "2000"),
        (0.1, {}, None),
        (9.0, {"GOMP_SPINCOUNT": "7"}, "7"),
        (9.0, {"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_threads_that_wait_sleep_soon_on_a_busy_machine_unless_the_environment_says_otherwise(
    load: float, given: dict[str, str], count: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", given)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    share_cores()
    assert given.get("GOMP_SPINCOUNT") == count


def test_the_command_shares_cores_before_torch_is_there() -> None:
    code = (
        "import os, sys\n"
        "os.getloadavg = lambda: (1000.0, 0, 0)\n"
        "from ddetr_cli.cli.app import main\n"
        "main(['--version'])\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2000"
