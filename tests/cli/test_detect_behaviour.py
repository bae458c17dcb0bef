"""How ``ddetr detect`` behaves as a part of somebody else's program: what it says, when it stops, what it takes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.cli.app import main

if TYPE_CHECKING:
    from collections.abc import Sequence

RUN = "import sys; from ddetr_cli.cli.app import main; sys.exit(main())"


def detect(model: str, *arguments: object) -> int:
    return main(["detect", "--model", model, "--device", "cpu", "-t", "0.2", *map(str, arguments)])


def images_in(output: Path) -> dict[str, dict[str, Any]]:
    images = json.loads((output / "images.json").read_text())["images"]
    return {image["file_name"]: image for image in images}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Ten pictures, of which 3, 5 and 7 are none."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(10):
        values = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    for number in (3, 5, 7):
        (folder / f"{number}.png").write_bytes(b"no picture")
    return folder


def test_json_progress_makes_every_line_of_stderr_an_object(
    model: str, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(model, mixed, "-o", tmp_path / "out", "--json-progress", "-v") == 3
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.err.splitlines()]
    assert captured.out == ""
    assert {"event": "start", "images": 10} in events
    images = [event for event in events if event["event"] == "image"]
    assert [image["done"] for image in images] == list(range(1, 11))
    assert [image["file_name"] for image in images if "failed" in image] == ["3.png", "5.png", "7.png"]
    end = [event for event in events if event["event"] == "end"]
    assert [(e["processed"], e["failed"], e["not_reached"]) for e in end] == [(7, 3, 0)]


def test_json_progress_holds_for_refusals_and_ends_with_its_run(
    model: str, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(model, tmp_path / "nowhere", "--json-progress") == 2
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["message"]
    assert detect(model, tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.startswith("ddetr: error: ")


@pytest.mark.parametrize(
    ("options", "failed", "reached"), [(["--fail-fast"], 1, 6), (["--max-failures", "1"], 2, 8), ([], 3, 10)]
)
def test_a_run_that_goes_wrong_stops_as_asked_and_names_what_it_left(
    model: str, mixed: Path, tmp_path: Path, options: list[str], failed: int, reached: int
) -> None:
    output = tmp_path / "out"
    assert detect(model, mixed, "-o", output, "-q", "--format", "coco", *options) == 3
    reasons = [image.get("failed", "") for image in images_in(output).values()]
    left = [reason for reason in reasons if "the run was stopped" in reason]
    assert sum(reason.startswith("not an image") for reason in reasons) >= failed
    assert 10 - reached <= len(left) <= (0 if reached == 10 else 9 - failed)
    for number in (3, 5, 7):
        shutil.copy(mixed / "0.png", mixed / f"{number}.png")
    assert detect(model, mixed, "-o", output, "-q", "--format", "coco", "--resume") == 0
    assert all("failed" not in image for image in images_in(output).values())


@pytest.mark.parametrize(
    "options",
    [["--fail-fast", "--max-failures", "2"], ["--max-failures", "-1"], ["--workers", "0"], ["--limit", "0"],
     ["--every", "0"]],
)  # fmt: skip
def test_limits_that_mean_nothing_exit_2(model: str, mixed: Path, tmp_path: Path, options: list[str]) -> None:
    assert detect(model, mixed, "-o", tmp_path / "out", *options) == 2
    assert not (tmp_path / "out").exists()


def test_batches_and_threads_change_no_byte(model: str, mixed: Path, tmp_path: Path) -> None:
    written = set()
    for batch in (1, 3, 8):
        for workers in (1, 2):
            output = tmp_path / f"{batch}-{workers}"
            options = ["-q", "--format", "coco,jsonl,csv", "-b", batch, "--workers", workers]
            assert detect(model, mixed, "-o", output, *options) == 3
            files = sorted(path for path in output.iterdir() if path.name != "run.json")
            written.add(tuple((path.name, path.read_bytes()) for path in files))
    assert len(written) == 1


def test_a_file_that_breaks_off_is_taken_and_marked_only_where_allowed(
    model: str, photos: Path, tmp_path: Path
) -> None:
    whole = (photos / "a.jpg").read_bytes()
    (photos / "a.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    assert detect(model, photos, "-o", tmp_path / "strict", "-q", "--format", "coco") == 3
    assert "truncated" in images_in(tmp_path / "strict")["a.jpg"]["failed"]
    options = ["-q", "--format", "coco,jsonl", "--allow-truncated"]
    assert detect(model, photos, "-o", tmp_path / "out", *options) == 0
    marked = {name for name, image in images_in(tmp_path / "out").items() if image.get("truncated")}
    lines = map(json.loads, (tmp_path / "out/detections.jsonl").read_text().splitlines())
    assert marked == {line["file_name"] for line in lines if line.get("truncated")} == {"a.jpg"}
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert (run["options"]["allow_truncated"], run["state"]) == (True, "finished")


def test_a_system_without_threads_to_give_gives_the_same_bytes(
    model: str, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert detect(model, mixed, "-o", tmp_path / "with", "-q") == 3

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert detect(model, mixed, "-o", tmp_path / "without", "-q") == 3
    for path in (tmp_path / "with").rglob("*.*g"):
        assert (tmp_path / "without" / path.relative_to(tmp_path / "with")).read_bytes() == path.read_bytes()
    assert (tmp_path / "without/detections.json").read_bytes() == (tmp_path / "with/detections.json").read_bytes()


def run_limited(model: str, photos: Path, output: Path, kind: int, limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, "detect", str(photos), "-m", model, "--device", "cpu", "-o", str(output)]
    return subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(kind, (limit, limit))
    )


def test_an_address_space_too_small_for_torch_exits_8_and_says_so(model: str, photos: Path, tmp_path: Path) -> None:
    done = run_limited(model, photos, tmp_path / "out", resource.RLIMIT_AS, 3_000_000_000)
    assert done.returncode == 8
    assert "memory: limited to 3.0 GB of address space (ulimit -v)" in done.stderr


@pytest.mark.slow
def test_64_file_handles_are_enough(model: str, mixed: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-cf", tmp_path / "all.tar", "-C", mixed, "."], check=True)
    for number in range(100):
        shutil.copy(tmp_path / "all.tar", mixed / f"{number}.tar")
    archives = sorted(map(str, mixed.glob("*.tar")))
    command = [sys.executable, "-c", RUN, "detect", *archives, "-m", model, "--device", "cpu", "--format", "coco"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert done.returncode == 3
    assert "processed 700, failed 300" in done.stderr


@pytest.mark.slow
def test_handles_are_given_back_over_the_whole_corpus_of_bad_pictures(
    model: str, data_dir: Path, tmp_path: Path
) -> None:
    from ddetr_cli.detect.reading import read_input
    from ddetr_cli.detect.sources import find_inputs
    from ddetr_cli.errors import ImageError

    def read_all() -> int:
        for item in find_inputs([str(data_dir / "bad_images")]).images:
            with contextlib.suppress(ImageError, MemoryError):
                read_input(item, max_pixels=10**7, allow_truncated=True)
        return len(os.listdir("/proc/self/fd"))

    counts: Sequence[int] = [read_all() for _ in range(4)]
    assert len(set(counts[1:])) == 1


@pytest.mark.slow
def test_a_picture_and_a_folder_that_the_system_refuses_fail_by_name(model: str, mixed: Path, tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace on this system")
    (mixed / "locked").mkdir()
    refused = [mixed / "0.png", mixed / "locked"]
    # The system says of these two what it says to a user without permission; root has it for everything.
    tracing = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject=openat:error=EACCES"]
    tracing += [option for path in refused for option in ("-P", str(path))]
    command = [sys.executable, "-c", RUN, "detect", str(mixed), "-m", model, "--device", "cpu", "--format", "coco"]
    done = subprocess.run([*tracing, *command, "-o", str(tmp_path / "out")], capture_output=True, text=True)
    if "strace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 3, done.stderr
    assert f"{refused[0]}: permission denied. Make the file readable." in done.stderr
    assert f"{refused[1]}: folder cannot be read (Permission denied). Check its permissions." in done.stderr
    assert "processed 6, failed 5, skipped 0" in done.stderr


@pytest.mark.slow
def test_without_permission_a_picture_and_a_folder_fail_by_name(model: str, mixed: Path, tmp_path: Path) -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None or os.geteuid() != 0:
        pytest.skip("needs root and setpriv: root itself may read everything")
    (mixed / "0.png").chmod(0)
    (mixed / "locked").mkdir(mode=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    shutil.copy(model, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").chmod(0o644)
    drop = [setpriv, "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    if subprocess.run([*drop, sys.executable, "-c", "import torch"], capture_output=True).returncode != 0:
        pytest.skip("nobody may not run this Python")
    command = [*drop, sys.executable, "-c", RUN, "detect", str(mixed), "-m", str(tmp_path / "model.safetensors")]
    command += ["--device", "cpu", "-o", str(tmp_path / "out/run"), "--format", "coco"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": "/nonexistent"})
    assert done.returncode == 3, done.stderr
    assert f"{mixed / '0.png'}: permission denied" in done.stderr
    assert f"{mixed / 'locked'}: folder cannot be read" in done.stderr
