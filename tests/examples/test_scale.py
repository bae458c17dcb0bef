"""The examples for more than one process or machine, run as their reader would run them, with small inputs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = ["--threshold", "0", "--device", "cpu", "--format", "coco,jsonl"]
TABLES = ("detections.json", "images.json", "detections.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("folder")
    for number in range(7):
        values = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"a picture {number}.png")
    (folder / "a picture 3.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def whole(environment: dict[str, str], model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process finds in them."""
    out = tmp_path_factory.mktemp("whole") / "out"
    command = ["ddetr", "detect", str(folder), "--model", str(model), "--output", str(out), *OPTIONS]
    assert subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode == 3
    return out


def run(command: list[str | Path], environment: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], env={**environment, **more}, capture_output=True, text=True, timeout=300
    )


def without_parallel(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """An environment in which only what the script names is on the path, and no GNU parallel."""
    ours = environment["PATH"].split(os.pathsep)[0]
    for name in ("bash", "sh", "env", "xargs", "seq"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    return {**environment, "PATH": f"{ours}{os.pathsep}{tmp_path}"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["parallel", "xargs"])
def test_detect_batch_gives_the_files_of_one_run_and_can_be_called_again(
    environment: dict[str, str], model: Path, folder: Path, whole: Path, tmp_path: Path, engine: str
) -> None:
    if engine == "parallel" and shutil.which("parallel") is None:
        pytest.skip("GNU parallel is not installed")
    if engine == "xargs":
        (tmp_path / "bin").mkdir()
        environment = without_parallel(environment, tmp_path / "bin")
    out = tmp_path / "out"
    for _ in range(2):
        command: list[str | Path] = [EXAMPLES / "detect_batch.sh", folder, out, "--model", model, *OPTIONS]
        done = run(command, environment, PARTS="3")
        assert done.returncode == 3, done.stderr
        for name in TABLES:
            assert (out / "all" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["parallel", "xargs"])
def test_detect_batch_stops_with_a_failure_where_a_part_cannot_run(
    environment: dict[str, str], folder: Path, tmp_path: Path, engine: str
) -> None:
    if engine == "parallel" and shutil.which("parallel") is None:
        pytest.skip("GNU parallel is not installed")
    if engine == "xargs":
        (tmp_path / "bin").mkdir()
        environment = without_parallel(environment, tmp_path / "bin")
    (tmp_path / "page.pth").write_text("<html>")
    command: list[str | Path] = [
        EXAMPLES / "detect_batch.sh",
        folder,
        tmp_path / "out",
        "--model",
        tmp_path / "page.pth",
    ]
    done = run(command, environment, PARTS="2", JOBS="1")
    assert done.returncode not in (0, 3)
    assert not (tmp_path / "out/all").exists()


def test_detect_batch_is_a_script_of_fifteen_lines_or_so_that_stops_at_errors() -> None:
    lines = [line for line in (EXAMPLES / "detect_batch.sh").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 15
    assert lines[0] == "set -euo pipefail"


@pytest.mark.slow
def test_detect_torchrun_gives_the_files_of_one_process(
    environment: dict[str, str], model: Path, folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command: list[str | Path] = [EXAMPLES / "detect_torchrun.sh", folder, out, "--model", model, *OPTIONS]
    done = run(command, environment, PROCESSES="2", OMP_NUM_THREADS="1")
    assert done.returncode != 0  # torchrun's own code, as one picture is broken
    assert "processed 6, failed 1, skipped 0" in done.stderr, done.stderr
    for name in TABLES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_the_tasks_of_detect_slurm_merge_their_parts_when_the_last_is_done(
    environment: dict[str, str], model: Path, folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for task in ("2", "1"):
        assert not (out / "all").exists()
        command: list[str | Path] = [EXAMPLES / "detect_slurm.sbatch", folder, out, "--model", model, *OPTIONS]
        done = run(command, environment, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="2")
        assert done.returncode in (0, 3), done.stderr
    for name in TABLES:
        assert (out / "all" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_detect_ray_gives_a_row_for_every_picture(
    environment: dict[str, str], model: Path, folder: Path, whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    command: list[str | Path] = ["python3", EXAMPLES / "detect_ray.py", folder, tmp_path / "out", "--model", model]
    done = run([*command, "--threshold", "0"], environment)
    assert done.returncode == 0, done.stderr
    written = [
        json.loads(line) for path in (tmp_path / "out").glob("*.json*") for line in path.read_text().splitlines()
    ]
    rows = {Path(row["path"]).name: row for row in written}
    expected = [json.loads(line) for line in (whole / "detections.jsonl").read_text().splitlines()]
    assert set(rows) == {line["file_name"] for line in expected}
    for line in expected:
        row = rows[line["file_name"]]
        assert bool(row["failed"]) == ("failed" in line)
        scores = [one["score"] for one in json.loads(row["detections"])]
        assert scores == pytest.approx([one["score"] for one in line.get("detections", [])], abs=1e-5)
