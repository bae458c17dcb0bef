"""A run of ``ddetr detect`` that broke off, in whatever way, goes on to the bytes of one that did not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.cli.app import main

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext
    from multiprocessing.process import BaseProcess

RUN = "import sys; from ddetr_cli.cli.app import main; sys.exit(main())"


def detect(model: str, *arguments: object) -> int:
    return main(["detect", "--model", model, "--device", "cpu", "-t", "0.2", *map(str, arguments)])


def results_in(output: Path) -> dict[str, bytes | set[bytes]]:
    """Every file of a run but run.json, which tells times; of the journal the lines, as failures are tried again.

    Nor the lock: one that nobody holds stays where a kill comes after the last file and before the end.
    """
    results: dict[str, bytes | set[bytes]] = {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in ("run.json", ".lock")
    }
    results["journal.jsonl"] = set((output / "journal.jsonl").read_bytes().splitlines())
    return results


def states(output: Path) -> tuple[str, dict[str, int], list[int | None]]:
    """State, counts, and how many images each session did, of run.json."""
    run = json.loads((output / "run.json").read_text())
    return run["state"], run["counts"], [session.get("done") for session in run["sessions"]]


def many_photos(folder: Path, count: int) -> None:
    """``count`` names for three pictures, one of them no picture."""
    folder.mkdir()
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number:04d}.jpg")
    (folder / "0002.jpg").write_bytes(b"no picture")
    for number in range(3, count):
        os.link(folder / f"{number % 3 if number % 30 == 2 else number % 2:04d}.jpg", folder / f"{number:04d}.jpg")


def cut_journal(output: Path, lines: int) -> None:
    """Leave what a kill after ``lines`` images leaves: a journal cut short in its next line, and no final files."""
    journal = (output / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (output / "journal.jsonl").write_bytes(b"".join(journal[: lines + 1]) + journal[lines + 1][:20])
    for name in ("detections.json", "images.json"):
        (output / name).unlink()
    (output / ".ddetr-1-0.tmp").write_text("[")


def traced(inject: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """``command`` under strace, which makes some of its system calls fail."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace on this system")
    tracing = [strace, "-f", "-qq", "-o", "/dev/null", "-e", inject]
    done = subprocess.run([*tracing, *command], capture_output=True, text=True)
    if "strace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    return done


def test_a_resumed_run_does_only_what_was_not_finished_and_ends_with_the_same_bytes(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddetr_cli.inference.predictor import Predictor

    output = tmp_path / "out"
    assert detect(model, photos, "-o", output) == 0
    whole = results_in(output)
    cut_journal(output, 2)
    predicted = []
    predict = Predictor.predict_prepared
    monkeypatch.setattr(Predictor, "predict_prepared", lambda *a: predicted.append(1) or predict(*a))  # type: ignore[func-returns-value]
    capsys.readouterr()
    assert detect(model, photos, "-o", output, "--resume") == 0
    assert len(predicted) == 1
    assert results_in(output) == whole
    err = capsys.readouterr().err
    assert "resumed: 2 of 3 images are finished already" in err
    assert "processed 3, failed 0, skipped 0" in err
    assert states(output)[::2] == ("finished", [3, 1])


def test_resuming_where_nothing_was_begun_begins(model: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        assert detect(model, photos, "-o", tmp_path / name, "--resume", "-q") == 0
    assert results_in(tmp_path / "new") == results_in(tmp_path / "empty")


def test_a_run_over_an_earlier_one_that_broke_off_keeps_its_pictures_when_resumed(
    model: str, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert detect(model, photos, "-o", output, "-q") == 0
    earlier = (output / "images.json").read_bytes()
    assert detect(model, photos, "-o", output, "-q", "--overwrite") == 0
    whole = results_in(output)
    cut_journal(output, 2)
    (output / "images.json").write_bytes(earlier)
    assert detect(model, photos, "-o", output, "-q", "--resume") == 0
    assert results_in(output) == whole


def test_failures_are_tried_again_and_with_skip_failed_they_are_not(model: str, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    good = (photos / "a.jpg").read_bytes()
    (photos / "a.jpg").write_bytes(b"no picture")
    assert detect(model, photos, "-o", output, "-q") == 3
    (photos / "a.jpg").write_bytes(good)
    assert detect(model, photos, "-o", output, "-q", "--resume", "--skip-failed") == 3
    assert states(output)[1]["failed"] == 1
    assert detect(model, photos, "-o", output, "-q", "--resume") == 0
    assert states(output)[1]["failed"] == 0
    assert detect(model, photos, "-o", tmp_path / "straight", "-q") == 0
    for name in ("detections.json", "images.json"):
        assert (output / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["-t", "0.3"], "threshold 0.2, not 0.3"),
        (["--image-size", "96"], "image_size 64, not 96"),
        (["--nms", "0.7"], "nms none, not 0.7"),
        (["--format", "coco"], "format coco,images, not coco"),
        (["--max-pixels", "100"], "max_pixels 89478485, not 100"),
    ],
)
def test_resuming_with_another_option_exits_2_and_names_it(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], said: str
) -> None:
    output = tmp_path / "out"
    assert detect(model, photos, "-o", output, "-q") == 0
    before = results_in(output)
    assert detect(model, photos, "-o", output, "--resume", *changed) == 2
    assert f"--resume: {output} was started with {said}. Run as then" in capsys.readouterr().err
    assert results_in(output) == before


def test_resuming_with_another_model_or_other_inputs_exits_2(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert detect(model, photos, "-o", output, "-q") == 0
    assert (
        main(["detect", str(photos), "-m", "demo", "--device", "cpu", "-t", "0.2", "-o", str(output), "--resume"])
        == 2
    )
    assert "model_sha256" in capsys.readouterr().err
    shutil.copy(photos / "a.jpg", photos / "b.jpg")
    assert detect(model, photos, "-o", output, "--resume") == 2
    assert "3 inputs, not 4" in capsys.readouterr().err
    moved = shutil.copy(model, tmp_path / "moved.safetensors")
    (photos / "b.jpg").unlink()
    assert detect(moved, photos, "-o", output, "--resume", "-q") == 0


def test_options_of_resuming_that_contradict_exit_2_and_a_folder_without_a_run_exits_7(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(model, photos, "-o", tmp_path / "out", "--resume", "--overwrite") == 2
    assert detect(model, photos, "-o", tmp_path / "out", "--skip-failed") == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    capsys.readouterr()
    assert detect(model, photos, "-o", tmp_path / "mine", "--resume") == 7
    assert "holds no run to resume (journal.jsonl is missing)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_two_runs_cannot_share_an_output(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddetr_cli.lock import folder_lock

    output = tmp_path / "out"
    with folder_lock(output, "run"):
        (output / ".ddetr-1-0.tmp").write_text("of the other run")
        for option in ("--resume", "--overwrite"):
            assert detect(model, photos, "-o", output, option) == 7
            assert f"{output}: locked by pid {os.getpid()}, another run" in capsys.readouterr().err
        assert (output / ".ddetr-1-0.tmp").exists()
    assert detect(model, photos, "-o", output, "--resume", "-q") == 0
    assert not (output / ".lock").exists()
    assert not (output / ".ddetr-1-0.tmp").exists()


def test_a_refused_run_leaves_no_folder(model: str, photos: Path, tmp_path: Path) -> None:
    page = tmp_path / "model.pth"
    page.write_text("<html>")
    assert detect(str(page), photos, "-o", tmp_path / "deep/out") == 5
    assert not (tmp_path / "deep").exists()


@pytest.mark.slow
def test_a_picture_that_crashes_the_program_is_found_and_left_out(model: str, photos: Path, tmp_path: Path) -> None:
    # Stands for a decoder that crashes: the process goes, with no word, when it reads this picture.
    code = (
        "import os, sys\n"
        "from ddetr_cli.detect import reading\n"
        "read = reading.read_picture\n"
        "def crash(path, **options):\n"
        "    if path.name == 'b.png':\n"
        "        os.kill(os.getpid(), 11)\n"
        "    return read(path, **options)\n"
        "reading.read_picture = crash\n"
        "from ddetr_cli.cli.app import main\n"
        "sys.exit(main())"
    )
    output = tmp_path / "out"
    command = [sys.executable, "-c", code, "detect", str(photos), "-m", model, "--device", "cpu", "-o", str(output)]
    command += ["--resume", "--skip-failed", "-q"]
    codes = [subprocess.run(command, capture_output=True).returncode for _ in range(4)]
    assert codes == [-signal.SIGSEGV] * 3 + [3]
    failed = {
        i["file_name"]: i["failed"]
        for i in json.loads((output / "images.json").read_text())["images"]
        if "failed" in i
    }
    assert list(failed) == ["sub/b.png"]
    assert "the program died at this picture" in failed["sub/b.png"]


@pytest.mark.parametrize("kind", ["AcceleratorError", "RuntimeError"])
def test_a_device_that_is_lost_exits_8_and_what_was_finished_is_not_done_again(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    import torch

    from ddetr_cli.inference.predictor import Predictor

    many_photos(tmp_path / "in", 8)  # the third of which is none
    forward, output, calls = Predictor.forward, tmp_path / "out", []

    def lose(predictor: Predictor, pixels: torch.Tensor) -> object:
        calls.append(len(pixels))
        if len(calls) > 3:
            raise getattr(torch, kind, RuntimeError)(
                "CUDA error: an illegal memory access was encountered\nCompile ..."
            )
        return forward(predictor, pixels)

    monkeypatch.setattr(Predictor, "forward", lose)
    assert detect(model, tmp_path / "in", "-o", output) == 8
    assert len(calls) == 4  # and not once for each picture left
    err = capsys.readouterr().err
    assert "ddetr: error: device cpu: failed (CUDA error: an illegal memory access was encountered). Run" in err
    images = json.loads((output / "images.json").read_text())["images"]
    reasons = [image.get("failed", "") for image in images]
    assert [why.startswith("not processed (device cpu: failed") for why in reasons] == [False] * 4 + [True] * 4
    assert len((output / "journal.jsonl").read_bytes().splitlines()) == 1 + 4
    monkeypatch.undo()
    assert detect(model, tmp_path / "in", "-o", output, "--resume") == 3
    assert "resumed: 3 of 8 images are finished already" in capsys.readouterr().err
    assert detect(model, tmp_path / "in", "-o", tmp_path / "straight", "-q") == 3
    resumed, straight = results_in(output), results_in(tmp_path / "straight")
    assert resumed == straight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "number"),
    [("fsync", 1), ("fsync", 3), ("rename,renameat,renameat2", 4), ("rename,renameat,renameat2", 6)],
)
def test_a_disk_that_fails_while_an_earlier_run_is_replaced_exits_7_and_leaves_whole_files(
    model: str, photos: Path, tmp_path: Path, call: str, number: int
) -> None:
    output = tmp_path / "out"
    assert detect(model, photos, "-o", output, "-q") == 0
    before = results_in(output)
    options = ["-m", model, "--device", "cpu", "-t", "0.1", "-q", "-o"]
    command = [sys.executable, "-c", RUN, "detect", str(photos), *options, str(output), "--overwrite"]
    # Journal, run.json, (pictures, without fsync), detections.json, images.json, run.json: from there on all fail.
    done = traced(f"inject={call}:error=EIO:when={number}+", command)
    assert done.returncode == 7, done.stderr
    assert "not written (Input/output error)" in done.stderr
    assert "Traceback" not in done.stderr
    after = results_in(output)
    for name in ("detections.json", "images.json"):
        assert after[name] == before[name]
    assert set(after) == set(before)
    assert main(["detect", str(photos), *options, str(output), "--overwrite"]) == 0
    assert main(["detect", str(photos), *options, str(tmp_path / "straight")]) == 0
    assert results_in(output) == results_in(tmp_path / "straight")


# Stands for a disk of the network that is gone: opening waits for a writer that never comes, in a thread that nothing
# can end but the end of the process.
HANG = (
    "import sys\n"
    "from ddetr_cli.detect import reading\n"
    "read = reading.read_picture\n"
    "def hang(path, **options):\n"
    "    if path.name in ('b.png', 'c.tif'):\n"
    "        open(sys.argv[-1] + '/pipe').read()\n"
    "    return read(path, **options)\n"
    "reading.read_picture = hang\n"
    "from ddetr_cli.cli.app import main\n"
    "sys.exit(main(sys.argv[1:-1]))"
)


@pytest.mark.slow
@pytest.mark.parametrize("is_last", [False, True])
def test_a_signal_ends_a_run_that_waits_for_a_disk_that_is_gone(
    model: str, photos: Path, tmp_path: Path, is_last: bool
) -> None:
    if is_last:
        next(photos.rglob("c.tif")).unlink()
    os.mkfifo(tmp_path / "pipe")
    output = tmp_path / "out"
    arguments = ["detect", str(photos), "-m", model, "--device", "cpu", "--format", "coco", "-o", str(output)]
    command = [sys.executable, "-c", HANG, *arguments, "--read-timeout", "86400", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not (
            (output / "journal.jsonl").exists() and b'"a.jpg"' in (output / "journal.jsonl").read_bytes()
        ):
            time.sleep(0.05)
        process.terminate()
        _, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 143
    count = 2 if is_last else 3
    assert f"failed 0, skipped 0, not reached {count - 1}" in err
    images = json.loads((output / "images.json").read_text())["images"]
    assert ["failed" in image for image in images] == [False, True, True][:count]
    assert "not read before the run was stopped (its disk or server does not answer)" in images[1]["failed"]
    assert states(output)[0] == "stopped"
    assert main([*arguments, "--resume", "--skip-failed", "-q"]) == 0
    assert main([*arguments[:-1], str(tmp_path / "straight"), "-q"]) == 0
    assert results_in(output) == results_in(tmp_path / "straight")


@pytest.mark.slow
def test_a_picture_that_never_ends_is_given_up_and_tried_again_when_resumed(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    shutil.copy(photos / "a.jpg", photos / "z.jpg")
    output = tmp_path / "out"
    options = ["-m", model, "--device", "cpu", "-t", "0.2", "--format", "coco,images,sheet", "-o", str(output)]
    arguments = ["detect", str(photos), *options, "--read-timeout", "10", "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", HANG, *arguments, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    reason = "not read within 10 s (its disk or server does not answer). Try again with --resume"
    assert done.stderr.count(reason) == 2
    assert "processed 2, failed 2, skipped 0" in done.stderr
    assert states(output)[0] == "finished"
    assert main(["detect", str(photos), *options, "--resume"]) == 0
    assert "resumed: 2 of 4 images are finished already" in capsys.readouterr().err
    assert main(["detect", str(photos), *options[:-1], str(tmp_path / "straight"), "-q"]) == 0
    resumed, straight = results_in(output), results_in(tmp_path / "straight")
    assert straight.pop("journal.jsonl") < resumed.pop("journal.jsonl")  # it tells of the failures too
    assert resumed == straight


def start(forkserver: ForkServerContext, arguments: list[str]) -> BaseProcess:
    """``ddetr *arguments`` in a process of its own, which says nothing."""
    code = (
        "import os, sys, torch\ntorch.set_num_threads(1)\n"
        "null = os.open(os.devnull, os.O_RDWR)\nos.dup2(null, 1)\nos.dup2(null, 2)\n"
        f"from ddetr_cli.cli.app import main\nsys.exit(main({arguments!r}))"
    )
    process = forkserver.Process(target=exec, args=(code, {}))
    process.start()
    return process


@pytest.mark.slow
def test_a_run_of_200_images_killed_at_50_random_moments_ends_with_the_same_bytes(
    forkserver: ForkServerContext, model: str, tmp_path: Path
) -> None:
    inputs, output = tmp_path / "in", tmp_path / "out"
    many_photos(inputs, 200)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in inputs.iterdir()}
    assert detect(model, inputs, "-o", tmp_path / "straight", "-q") == 3
    whole = results_in(tmp_path / "straight")
    moments = random.Random(6)
    arguments = ["detect", str(inputs), "-m", model, "--device", "cpu", "-t", "0.2", "-o", str(output), "--resume"]
    kills = finished = 0
    before_it = time.monotonic()
    start(forkserver, arguments).join()
    longest = 1.1 * (time.monotonic() - before_it)
    while kills < 50:
        if output.exists() and (output / "run.json").exists() and states(output)[0] == "finished":
            assert results_in(output) == whole
            shutil.rmtree(output)
            finished += 1
        process = start(forkserver, arguments)
        process.join(moments.random() * longest / 3)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
    start(forkserver, arguments).join()
    assert results_in(output) == whole
    assert not (output / ".lock").exists()
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in inputs.iterdir()} == before


@pytest.mark.slow
def test_a_run_killed_in_every_rename_ends_with_the_same_bytes(model: str, photos: Path, tmp_path: Path) -> None:
    assert detect(model, photos, "-o", tmp_path / "straight", "-q") == 0
    whole = results_in(tmp_path / "straight")
    output = tmp_path / "out"
    command = [sys.executable, "-c", RUN, "detect", str(photos), "-m", model, "--device", "cpu", "-t", "0.2", "-q"]
    command += ["-o", str(output), "--resume"]
    for number in range(1, 20):
        shutil.rmtree(output, ignore_errors=True)
        done = traced(f"inject=rename,renameat,renameat2:signal=SIGKILL:when={number}", command)
        if done.returncode == 0:
            break
        assert detect(model, photos, "-o", output, "-q", "--resume") == 0
        assert results_in(output) == whole
    # journal, run.json, three pictures, two tables, run.json again
    assert number == 9
