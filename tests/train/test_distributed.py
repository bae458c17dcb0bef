"""Trainings of two processes, on the CPU over gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr_cli.train.checkpoints import read_snapshot

EXAMPLES = Path(__file__).parents[2] / "examples"

# A trunk whose batch-norm is frozen, as the published one's, and no dropout: nothing then depends on who sees what.
# Writes down the loss of every step, as numbers of full precision.
EXACT = """
from dataclasses import replace
from ddetr_cli.model.backbone import BACKBONES, FrozenBatchNorm2d
from ddetr_cli.presets import PRESETS
from ddetr_cli.train.loop import Trainer
BACKBONES["resnet-tiny"] = replace(BACKBONES["resnet-tiny"], norm=FrozenBatchNorm2d)
PRESETS["tiny"] = replace(PRESETS["tiny"], dropout=0.0)
_step = Trainer.step
def _noted(self, *args, **more):
    result = _step(self, *args, **more)
    with open({losses!r}, "a") as file:
        print(repr(result.loss), file=file)
    return result
Trainer.step = _noted
"""
SLOW_STEPS = """
import pathlib, time
from ddetr_cli.train.loop import Trainer
_slow_step = Trainer.step
def _slow(self, *args, **more):
    result = _slow_step(self, *args, **more)
    pathlib.Path({sign!r}).touch()
    time.sleep(0.05)
    return result
Trainer.step = _slow
"""


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "train", str(data), "-o", str(run), "--preset", "tiny", "--image-size", "48", "--queries", "9",
        "--batch-size", "4", "--device", "cpu", *more,
    ]  # fmt: skip


def rank(index: int, count: int, port: int) -> str:
    """Code that makes a process one of several, as torchrun would."""
    values = {
        "RANK": index,
        "LOCAL_RANK": index,
        "WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return f"import os\nos.environ.update({ {name: str(value) for name, value in values.items()} })\n"


def start_two(trainings: Any, command: list[str], logs: Path, code: Callable[[int], str]) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        trainings.start(command, logs.with_name(f"{logs.name}{i}"), before=rank(i, 2, port) + code(i))
        for i in range(2)
    ]  # fmt: skip


def ended(processes: list[Any], logs: Path, seconds: float = 120) -> list[int]:
    """The exit codes; none may take longer."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert None not in codes, said(logs)
    return codes


def said(logs: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(logs.parent.glob(f"{logs.name}*")))


def test_two_processes_equal_one_with_the_doubled_batch(dozen: Path, trainings: Any, tmp_path: Path) -> None:
    def code(name: str) -> str:
        return EXACT.format(losses=str(tmp_path / name))

    more = ("--epochs", "7", "--eval-every", "7")  # 21 steps
    one, two, logs = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert trainings.run(arguments(dozen, one, *more), logs, before=code("alone")) == 0, said(logs)
    processes = start_two(trainings, arguments(dozen, two, *more), logs, lambda i: code(f"of{i}"))
    assert ended(processes, logs) == [0, 0], said(logs)
    alone, *shares = (
        [float(line) for line in (tmp_path / n).read_text().splitlines()] for n in ("alone", "of0", "of1")
    )
    assert len(alone) == 21 and shares[0] == shares[1]
    # Sums in another order: rounding, which 20 steps of training enlarge.
    assert shares[0] == pytest.approx(alone, rel=1e-5)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    for mine, theirs in zip(*rows, strict=True):
        assert theirs["loss_bbox"] == pytest.approx(mine["loss_bbox"], rel=1e-4)
    assert rows[1][-1]["val"] == score_again(two, dozen)
    assert json.loads((two / "config.json").read_text())["processes"] == 2


def score_again(run: Path, data: Path) -> dict[str, Any]:
    """The numbers of RUN/last.safetensors, by one process and with other code: ``ddetr eval``'s."""
    from ddetr_cli.data.coco import read_annotations
    from ddetr_cli.evaluate.mapping import map_classes
    from ddetr_cli.evaluate.metrics import evaluate_detections
    from ddetr_cli.evaluate.run import predict_images
    from ddetr_cli.inference.predictor import Predictor
    from ddetr_cli.model.backbone import BACKBONES
    from ddetr_cli.weights import load_model

    annotations = read_annotations(data / "annotations" / "val.json")
    with pytest.MonkeyPatch.context() as patch:
        for name, table in (("resnet-tiny", BACKBONES),):
            patch.setitem(table, name, table[name])
        exec(EXACT_TRUNK, {})
        loaded = load_model(str(run / "last.safetensors"))
    results = predict_images(
        Predictor(loaded, device="cpu"),
        annotations,
        data / "images",
        map_classes(loaded.classes, annotations.categories),
        map_missing="drop",
    )
    found = [detection for result in results for detection in result.detections]
    return evaluate_detections(annotations, found).to_json(per_class=True)


EXACT_TRUNK = """
from ddetr_cli.model.backbone import BACKBONES, BackboneSpec, BasicBlock, FrozenBatchNorm2d
BACKBONES["resnet-tiny"] = BackboneSpec(BasicBlock, 16, 3, (16, 16, 16, 16), (1, 1, 1, 1), FrozenBatchNorm2d, ())
"""


@pytest.mark.slow
def test_pictures_without_objects_on_one_process_hang_nothing(
    trainings: Any, tmp_path: Path, write_split: Callable[..., None]
) -> None:
    data, logs = tmp_path / "data", tmp_path / "log"
    write_split(data, "train", 8, seed=1)
    write_split(data, "val", 1, seed=2)  # and the second process has nothing to validate
    path = data / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 0]
    path.write_text(json.dumps(content))
    command = arguments(data, tmp_path / "run", "--epochs", "2", "--batch-size", "2")
    assert ended(start_two(trainings, command, logs, lambda _: ""), logs) == [0, 0], said(logs)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 0]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_going_on_is_exact(
    dozen: Path, trainings: Any, tmp_path: Path
) -> None:
    run, logs, sign = tmp_path / "run", tmp_path / "log", tmp_path / "sign"
    more = ("--epochs", "8", "--eval-every", "8")
    processes = start_two(
        trainings, arguments(dozen, run, *more), logs, lambda _: SLOW_STEPS.format(sign=str(sign))
    )  # fmt: skip
    wait_for(sign, processes, logs)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert ended(processes, logs) == [143, 143], said(logs)
    assert said(logs).count("Go on with: ddetr train --resume") == 1
    (path,) = (run / "checkpoints").iterdir()
    assert 1 <= read_snapshot(path).facts["steps_done"] < 24
    resume = ["train", "--resume", str(run)]
    assert trainings.run(resume, logs) == 2  # alone
    assert "was started with 2 processes, not 1" in said(logs)
    assert ended(start_two(trainings, resume, logs, lambda _: ""), logs) == [0, 0], said(logs)
    whole = tmp_path / "whole"
    assert ended(start_two(trainings, arguments(dozen, whole, *more), logs, lambda _: ""), logs) == [0, 0], said(logs)
    found = [read_snapshot(max((r / "checkpoints").iterdir())) for r in (run, whole)]
    assert found[0].facts == found[1].facts
    assert all(torch.equal(tensor, found[1].tensors[name]) for name, tensor in found[0].tensors.items())


@pytest.mark.slow
def test_where_one_process_dies_the_other_saves_and_ends(dozen: Path, trainings: Any, tmp_path: Path) -> None:
    run, logs, sign = tmp_path / "run", tmp_path / "log", tmp_path / "sign"
    command = arguments(dozen, run, "--epochs", "9999", "--eval-every", "9999")
    processes = start_two(trainings, command, logs, lambda _: SLOW_STEPS.format(sign=str(sign)))
    wait_for(sign, processes, logs)
    processes[1].kill()
    assert ended(processes, logs, seconds=60) == [8, -signal.SIGKILL], said(logs)
    assert "another of its processes has ended" in said(logs)
    (path,) = (run / "checkpoints").iterdir()
    assert read_snapshot(path).facts["steps_done"] >= 1


def wait_for(sign: Path, processes: list[Any], logs: Path) -> None:
    deadline = time.monotonic() + 120
    while not sign.exists():
        assert all(p.is_alive() for p in processes) and time.monotonic() < deadline, said(logs)
        time.sleep(0.01)


SRUN = """#!/usr/bin/env bash
# What srun does, on one machine: so many copies of the command, each with its number; the highest exit code.
[[ $1 == --kill-on-bad-exit=1 ]] && shift
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
done
highest=0
for pid in "${pids[@]}"; do
    while :; do
        wait "$pid"; code=$?
        kill -0 "$pid" 2>/dev/null || break   # a trapped signal ends wait early
    done
    wait "$pid" 2>/dev/null; again=$?; [[ $again != 127 ]] && code=$again
    (( code > highest )) && highest=$code
done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, nano_code: str) -> dict[str, str]:
    """One in which ddetr trains a nano model, torchrun is that of this Python, and SLURM's commands are stand-ins."""
    folder = tmp_path_factory.mktemp("bin")
    sign = folder / "step"
    program = folder / "ddetr.py"
    program.write_text(
        f"{nano_code}\n{SLOW_STEPS.format(sign=str(sign))}\n"
        "import sys\nfrom ddetr_cli.cli.app import main\nsys.exit(main())\n"
    )
    scripts = {
        "ddetr": f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n',
        "torchrun": f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n',
        "srun": SRUN,
        "scontrol": SCONTROL,
    }
    for name, content in scripts.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "SIGN": str(sign),
        "REQUEUED": str(folder / "requeued"),
    }  # fmt: skip


@pytest.mark.slow
def test_the_torchrun_example_trains_in_two_processes_and_goes_on(
    dozen: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [str(EXAMPLES / "train_torchrun.sh"), str(dozen), str(tmp_path / "run")]
    options = arguments(dozen, tmp_path / "run", "--epochs", "2")[4:]
    environment = {**environment, "PROCESSES": "2"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    # On a slow machine lines tell of the steps within an epoch too.
    told = [line.split(",")[0] for line in done.stderr.splitlines() if line.startswith("epoch")]
    assert [line for line in told if "steps" not in line] == ["epoch 1 of 2", "epoch 2 of 2"]
    again = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0 and "all 2 epochs are done" in again.stderr


@pytest.mark.slow
def test_the_slurm_example_stops_before_the_time_is_up_and_goes_back_into_the_queue(
    dozen: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [str(EXAMPLES / "train_slurm.sbatch"), str(dozen), str(run)]
    command += arguments(dozen, run, "--epochs", "40", "--eval-every", "40")[4:]
    slurm = {**environment, "SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]"}
    sign, requeued = Path(slurm["SIGN"]), Path(slurm["REQUEUED"])
    sign.unlink(missing_ok=True)
    process = subprocess.Popen(command, env=slurm, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while not sign.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        # As SLURM does it: to the steps of the job, not to its script.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGUSR1)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert requeued.read_text() == "4711\n"
    (path,) = (run / "checkpoints").iterdir()
    steps = read_snapshot(path).facts["steps_done"]
    again = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr
    assert f"{steps % 3} of 3 steps" in again.stderr or f"after epoch {steps // 3} of 40." in again.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 40
