"""``ddetr bench`` as the user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddetr_cli.cli.app import main

SMALL = ["bench", "--models", "tiny", "--image-size", "64", "--rounds", "2", "--warmup", "1", "--device", "cpu"]


def test_bench_prints_the_table_on_stdout_and_nothing_else_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("64x85 px")
    row = next(line.split() for line in lines if line.split()[:1] == ["tiny"])
    assert row[1:4] == ["random", "6.44", "6.44"]
    assert any(line.startswith("kernels: cpu ") for line in lines)


def test_bench_writes_everything_measured_as_json(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert main([*SMALL, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [model["name"] for model in document["models"]] == ["tiny"]
    assert len(document["models"][0]["latency_s"]["samples"]) == 2


def test_an_existing_json_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text("old")
    assert main([*SMALL, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["format"] == 1


@pytest.mark.parametrize(
    "bad",
    [
        ["--image-size", "0"],
        ["--image-size", "8OO"],
        ["--batch-size", "0"],
        ["--batch-size", "-3"],
        ["--batch-size", "1000000000"],
        ["--rounds", "0"],
        ["--warmup", "0"],
        ["--precision", "fp8"],
        ["--device", "gpu"],
        ["--models", ","],
    ],
)
def test_a_bad_value_exits_2_before_any_model_is_built(
    bad: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("ddetr_cli.bench.run.build_detector", refuse)
    assert main(["bench", *bad]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "ddetr: error:" in captured.err


def test_a_json_file_in_a_folder_that_is_not_there_exits_7_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddetr_cli.bench.run.run_bench", lambda *_, **__: pytest.fail("measured"))
    assert main([*SMALL, "--json", str(tmp_path / "absent" / "bench.json")]) == 7
    assert "bench.json" in capsys.readouterr().err


def test_a_device_that_is_not_there_exits_8(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL[:-1], "cuda:999"]) == 8
    assert "cuda:999" in capsys.readouterr().err
