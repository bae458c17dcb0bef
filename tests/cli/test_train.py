from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from ddetr_cli.cli.app import main
from ddetr_cli.cli.console import StopSignals, Terminated
from ddetr_cli.train import run as train_run
from ddetr_cli.train.epochs import TrainResult
from ddetr_cli.train.loop import Progress
from ddetr_cli.train.options import TrainOptions


@pytest.fixture
def handed_down(monkeypatch: pytest.MonkeyPatch) -> list[TrainOptions]:
    """The options that reach the library, which does not train."""
    seen: list[TrainOptions] = []

    def record(options: TrainOptions, progress: object, stop: object, draw: object) -> TrainResult:
        seen.append(options)
        return TrainResult(options.output / "best.safetensors", 3, 0.5)

    monkeypatch.setattr(train_run, "run_training", record)
    return seen


def test_options_reach_the_library_unchanged(
    handed_down: list[TrainOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        ["train", "cells", "-o", "run", "--preset", "tiny", "--epochs", "7", "--image-size", "192", "--queries", "50",
         "--batch-size", "4", "--seed", "1", "--augment", "top-down", "--device", "cpu"]
    )  # fmt: skip
    assert code == 0
    assert handed_down == [
        TrainOptions(
            output=Path("run"), data=Path("cells"), preset="tiny", epochs=7, image_size=192, queries=50, batch_size=4,
            seed=1, augmentation="top-down", precision="fp32", device="cpu",
        )
    ]  # fmt: skip
    captured = capsys.readouterr()
    assert "best validation AP 0.5000 (epoch 3): run/best.safetensors" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "DATA: missing"),
        (["train", "x", "--preset", "r51"], "unknown. Choose one of r50"),
        (["train", "x", "--preset", "fasterrcnn-r50-fpn"], "fasterrcnn-r50-fpn: cannot be trained here"),
        (["train", "x", "--epochs", "0"], "epochs"),
        (["train", "x", "--learning-rate", "nan"], "not a positive number"),
        (["train", "x", "--batch-size", "-3"], "batch-size"),
        (["train", "x", "--device", "tpu"], "Choose auto, cpu, cuda"),
        (["train", "x", "--override"], "of use with --resume only"),
        (["train", "--resume", "run", "--output", "other"], "goes on in its own folder"),
        (["train", "x", "--ema", "1"], "ema"),
        (["train", "x", "--keep", "0"], "keep"),
        (["train", "x", "--save-every", "-1"], "save-every"),
        (["train", "x", "--accumulate", "0"], "accumulate"),
        (["train", "x", "--init", "demo", "--backbone-weights", "none"], "Leave one out"),
        (["train", "x", "--seed", "99999999999"], "seed"),
    ],
)
def test_a_wrong_value_exits_2_before_anything_is_read(
    arguments: list[str], message: str, handed_down: list[TrainOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert handed_down == []


def test_resume_takes_the_options_of_the_run(
    handed_down: list[TrainOptions], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddetr_cli.atomic import write_json

    first = TrainOptions(output=tmp_path, data=Path("cells"), preset="tiny", epochs=9)
    write_json(tmp_path / "config.json", {"options": first.to_json()})
    assert main(["train", "--resume", str(tmp_path), "--workers", "2"]) == 0
    (options,) = handed_down
    assert (options.resume, options.epochs, options.preset, options.workers) == (True, 9, "tiny", 2)
    assert options.data == Path("cells").resolve() and options.output == tmp_path


def test_resuming_a_folder_that_is_no_run_exits_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(tmp_path)]) == 5
    assert "not a run to resume" in capsys.readouterr().err


def test_a_missing_data_set_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "nowhere"), "-o", str(tmp_path / "run"), "--preset", "tiny"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_an_unreachable_backbone_exits_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from PIL import Image

    monkeypatch.setenv("DDETR_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    # Nobody listens there: the machine that runs this may well have a network.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    (tmp_path / "images").mkdir()
    images = []
    for i in range(10):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 32, "height": 32})
    boxes = [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in range(10)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "dot"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    arguments = ["train", "--images", str(tmp_path / "images"), "--annotations", str(tmp_path / "train.json")]
    assert main([*arguments, "-o", str(tmp_path / "run")]) == 5
    assert "resnet50" in capsys.readouterr().err


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_leaves_warnings_only(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    val: dict[str, float | None] = {"AP": 0.25, "AP50": 0.5, "APs": None, "APm": 0.25, "APl": 0.25}

    def talk(options: TrainOptions, progress: Progress, stop: object, draw: object) -> TrainResult:
        progress.note("downloading")
        progress.warn("no val split")
        progress.step(1, 1, 1, 2.0)
        row = {
            "epoch": 1,
            "loss": 2.0,
            "images_per_second": 3.0,
            "skipped_steps": 1,
            "bottleneck": "device",
            "val": val,
        }
        progress.epoch(row)
        return TrainResult(options.output / "best.safetensors", 1, None)

    monkeypatch.setattr(train_run, "run_training", talk)
    assert main(["train", "cells", *(["--quiet"] if quiet else [])]) == 0
    lines = capsys.readouterr().err.splitlines()
    if quiet:
        assert lines == ["ddetr: warning: no val split"]
    else:
        assert lines[:2] == ["downloading", "ddetr: warning: no val split"]
        assert lines[2].startswith(
            "epoch 1, loss 2.000, 3.0 images/s, 1 steps skipped (loss not finite), AP 0.250, AP50 0.500, APs n/a"
        )
        assert lines[3] == "best validation AP n/a (epoch 1): ddetr-run/best.safetensors"


def test_options_of_a_resumed_run_that_differ_are_named(
    handed_down: list[TrainOptions], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddetr_cli.atomic import write_json

    first = TrainOptions(output=tmp_path, data=Path("cells"), preset="tiny", epochs=9, augmentation="paper")
    write_json(tmp_path / "config.json", {"options": first.to_json()})
    resume = ["train", "--resume", str(tmp_path)]
    assert main([*resume, "--epochs", "12", "--augment", "jitter"]) == 2
    assert "was started with " in (err := capsys.readouterr().err)
    assert "epochs 9, not 12" in err and "augmentation paper, not jitter" in err and "--override" in err
    assert main([*resume, "--queries", "7", "--override"]) == 2
    assert "--init" in capsys.readouterr().err
    # What is the same may be said again, and a default that was not asked for is no change.
    assert main([*resume, "--epochs", "9", "--preset", "tiny", "--keep", "5"]) == 0
    assert main([*resume, "--epochs", "12", "--override"]) == 0
    assert [(options.epochs, options.keep, options.override) for options in handed_down] == [
        (9, 5, False), (12, 2, True),
    ]  # fmt: skip


def test_the_help_page_groups_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    sections = [
        line for line in capsys.readouterr().out.splitlines() if line.endswith(":") and not line.startswith(" ")
    ]
    assert sections == ["Arguments:", "Model:", "Recipe:", "Data:", "Run:", "Options:"]


def test_a_signal_that_arrives_twice_at_once_is_one_request_where_a_grace_is_given(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with StopSignals((signal.SIGTERM, signal.SIGUSR1), grace=3600.0) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGUSR1
    with StopSignals((signal.SIGTERM,)):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_a_run_that_was_stopped_names_the_command_to_go_on_with_and_its_exit_code(
    number: str, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped(options: TrainOptions, progress: Progress, stop: StopSignals, draw: object) -> TrainResult:
        with stop:
            os.kill(os.getpid(), getattr(signal, number))
        return TrainResult(options.output / "best.safetensors", 0, None, stopped=True)

    monkeypatch.setattr(train_run, "run_training", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        assert main(["train", "cells", "-o", "my run"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert "saved. Go on with: ddetr train --resume 'my run'" in capfd.readouterr().err
