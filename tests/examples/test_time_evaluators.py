from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_both_evaluators_are_timed_and_give_equal_numbers(repository: Path) -> None:
    program = repository / "examples/time_evaluators.py"
    sizes = ["--images", "20", "--objects", "100", "--detections", "500", "--rounds", "2"]
    done = subprocess.run([sys.executable, str(program), *sizes], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["ddetr", "pycocotools"] * 2
    assert all(re.search(r"\d s +[\d.]+ CPU s +\d+ MB$", line) for line in lines[:4])
    assert re.fullmatch(r"peak memory: pycocotools takes [\d.]+ times as much", lines[6])
    assert lines[7] == "numbers: equal to the last bit"
