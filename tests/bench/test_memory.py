"""Peak memory of processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ddetr_cli.bench.memory import peak_process_memory, peak_resident_bytes


def test_the_peak_is_read_from_what_the_system_says(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tddetr\nVmPeak:\t  99 kB\nVmHWM:\t    2048 kB\nVmRSS:\t   12 kB\n")
    assert peak_resident_bytes(status) == 2 << 20


def test_a_system_that_does_not_say_gives_none(tmp_path: Path) -> None:
    assert peak_resident_bytes(tmp_path / "absent") is None
    (tmp_path / "status").write_text("Name:\tddetr\n")
    assert peak_resident_bytes(tmp_path / "status") is None


def test_memory_given_back_still_counts() -> None:
    code = (
        "from ddetr_cli.bench.memory import peak_resident_bytes\n"
        "before = peak_resident_bytes(); block = bytearray(b'x') * (200 << 20); del block\n"
        "print(before is None or peak_resident_bytes() - before > 150 << 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_a_fresh_process_that_runs_the_small_model_holds_torch_and_little_more() -> None:
    peak = peak_process_memory("tiny", (64, 64), "fp32", 1)
    assert peak is None or 100 << 20 < peak < 2 << 30
