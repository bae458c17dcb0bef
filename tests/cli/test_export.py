from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ddetr_cli.classes import COCO_TABLE
from ddetr_cli.cli.app import main
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import get_preset
from ddetr_cli.weights import load_model, save_checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small Deformable DETR of one scale with random weights, dilated, which tensors do not show."""
    config = get_preset(
        "r50-single-scale-dc5", hidden_dim=32, encoder_layers=1, decoder_layers=1, ffn_dim=32, queries=7
    )
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    torch.manual_seed(0)
    save_checkpoint(path, build_detector(config), COCO_TABLE)
    return str(path)


@pytest.mark.parametrize(
    ("to", "files"),
    [
        ("huggingface", ["config.json", "preprocessor_config.json", "model.safetensors"]),
        ("authors", []),
        ("ddetr", []),
    ],
)
def test_the_files_written_are_on_stdout_and_hold_the_same_model(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, files: list[str]
) -> None:
    output = tmp_path / "out"
    assert main(["export", small, "--to", to, "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(output / name) for name in files] or [str(output)]
    assert err == f"model: {small} (r50-single-scale-dc5, 91 classes, ddetr) written for {to}\n"
    given, again = load_model(small), load_model(str(output))
    assert again.config.dilation and again.classes == given.classes
    first, second = given.model.state_dict(), again.model.state_dict()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_what_exists_is_replaced_only_if_asked(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for to, output in (("authors", tmp_path / "model.pth"), ("huggingface", tmp_path / "folder")):
        command = ["export", small, "--to", to, "-o", str(output), "-q"]
        assert main(command) == 0
        before = output.stat().st_ino if output.is_file() else (output / "model.safetensors").stat().st_ino
        assert main(command) == 7
        assert f"{output}: exists already. Choose another --output, or pass --overwrite." in capsys.readouterr().err
        assert main([*command, "--overwrite"]) == 0
        after = output.stat().st_ino if output.is_file() else (output / "model.safetensors").stat().st_ino
        assert before != after


def test_a_file_where_a_folder_is_needed_and_the_reverse_are_usage_errors(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["export", small, "--to", "huggingface", "-o", str(tmp_path / "file"), "--overwrite"]) == 2
    assert main(["export", small, "--to", "authors", "-o", str(tmp_path), "--overwrite"]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'file'}: a file" in err and f"{tmp_path}: not a regular file" in err


def test_a_special_file_is_never_replaced(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(["export", small, "--to", "authors", "-o", str(pipe), "--overwrite"]) == 2
    assert f"{pipe}: not a regular file" in capsys.readouterr().err
    assert pipe.is_fifo()


def test_a_file_name_that_no_disk_takes_is_an_output_error(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", small, "--to", "authors", "-o", str(tmp_path / ("x" * 300))]) == 7
    assert "File name too long" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "no such model", "--to", "authors", "-o", "/proc/here/x.pth"]) == 7
    assert "no such model:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--to", "authors"], "MODEL: empty"),
        (["demo", "--to", "onnx"], "'onnx' is not one of"),
        (["demo", "--to", "authors", "--preset", "r51"], "Choose one of"),
        (["demo", "--to", "authors"], "its trunk exists in ddetr only"),
    ],
)
def test_what_cannot_be_meant_or_written_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["export", *arguments, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bad_model_is_refused_and_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.pth").write_bytes(b"<html>")
    assert main(["export", str(tmp_path / "bad.pth"), "--to", "authors", "-o", str(tmp_path / "out.pth")]) == 5
    assert "not a checkpoint (an HTML page" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_what_a_file_cannot_tell_is_a_warning(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", small, "--to", "authors", "-o", str(tmp_path / "a.pth"), "-q"])
    stored = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save(stored["model"], tmp_path / "bare.pth")
    assert (
        main(["export", str(tmp_path / "bare.pth"), "--to", "ddetr", "-o", str(tmp_path / "b.safetensors"), "-q"])
        == 0
    )
    assert "assumed not (--preset r50-single-scale-dc5 if it is)" in capsys.readouterr().err
