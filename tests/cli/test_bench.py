"""``ddetr bench`` as the user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddetr_cli.cli.app import main

SMALL = ["bench", "--models", "tiny", "--image-size", "64", "--rounds", "2", "--warmup", "1", "--device", "cpu"]


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that are measured in a moment."""
    monkeypatch.setattr("ddetr_cli.bench.ceilings.CONVOLUTIONS", ((32, 8, 8),))
    monkeypatch.setattr("ddetr_cli.bench.ceilings.COPY_BYTES", 1 << 20)


def test_bench_prints_the_tables_on_stdout_and_nothing_else_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("64x85 px")
    assert "allocator" in lines[1]
    rows = [line.split() for line in lines if line.split()[:1] == ["tiny"]]
    assert rows[0][:3] == ["tiny", "6.44", "6.44"]
    assert rows[1][:3] == ["tiny", "random", "auto:"]
    assert any(line.startswith("kernels: cpu ") for line in lines)


def test_tables_are_written_in_markdown_for_a_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--sizes", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("- 64x85 px")
    assert lines[lines.index("**sizes**") + 3].startswith("| --- | ---: |")
    assert any(line.startswith("| tiny | 6.44 | 6.44 |") for line in lines)


def test_a_wide_table_folds_its_headings_and_never_a_name_or_a_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddetr_cli.bench.tables import Table

    name, figure = "r50-single-scale-dc5", "0.873x (0.871-0.880)"
    headings = ("system", *(f"images per second in round {n}" for n in range(5)))
    table = Table("wide", headings, ((name, *[figure] * 5),))
    monkeypatch.setattr("ddetr_cli.bench.run.BenchReport.tables", lambda _: [table])
    assert main([*SMALL, "--sizes"]) == 0
    drawn = capsys.readouterr().out.split("wide\n")[1]
    assert drawn.count(name) == 1 and drawn.count(figure) == 5
    assert drawn.count("images per second in") == 5 and "in round" not in drawn


def test_bench_writes_everything_measured_as_json(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert main([*SMALL, "--precision", "fp32,bf16", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [measurement["kind"] for measurement in document["measurements"]] == ["sizes", "latency"]
    latency = document["measurements"][1]["result"]
    assert [model["precision"] for model in latency] == ["fp32", "bf16"]
    assert [len(model["seconds"]["samples"]) for model in latency] == [2, 2]


def test_an_existing_json_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text("old")
    assert main([*SMALL, "--sizes", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["format"] == 2


@pytest.mark.usefixtures("small_probes")
def test_what_is_chosen_is_measured_instead_and_together(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    chosen = ["--sizes", "--stages", "--folder", str(photos)]
    assert main([*SMALL, *chosen, "--json", str(path)]) == 0
    measurements = json.loads(path.read_text())["measurements"]
    assert [measurement["kind"] for measurement in measurements] == ["sizes", "stages", "folder"]
    assert measurements[2]["result"]["pictures"] == 3
    stages = measurements[1]["result"]["models"][0]["stages"]
    assert {"image decoding", "preprocessing", "backbone", "drawing", "writing"} <= set(stages)


def test_a_folder_is_left_as_it_was(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(photos.rglob("*"))
    assert main([*SMALL, "--folder", str(photos)]) == 0
    assert sorted(photos.rglob("*")) == before
    assert "folder of 3 pictures" in capsys.readouterr().out


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
        ["--precision", ""],
        ["--device", "gpu"],
        ["--models", ","],
        ["--allocator", "fast"],
        ["--op", "--val2017", "coco"],
        ["--plot", "a.png"],
        ["--card", "--scaling", "--plot", "a.png"],
        ["--card", "--plot", "a.txt"],
        ["--compare", "absent.json", "absent.json"],
    ],
)
def test_a_bad_value_exits_2_before_anything_is_measured(
    bad: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddetr_cli.bench.run.run_bench", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", *bad]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "ddetr: error:" in captured.err


def test_two_reports_are_compared_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    assert main([*SMALL, "--json", str(path)]) == 0
    capsys.readouterr()
    monkeypatch.setattr("ddetr_cli.bench.run.run_bench", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "--compare", str(path), str(path)]) == 0
    assert "1.00x" in capsys.readouterr().out


def test_the_card_scores_checkpoints_on_the_data_set_it_is_given(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder as COCO's: pictures in val2017/, a file of annotations beside."""
    monkeypatch.setattr("ddetr_cli.bench.card.peak_process_memory", lambda *_: None)
    photos.rename(tmp_path / "val2017")
    (tmp_path / "annotations").mkdir()
    document = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 1, "bbox": [4, 4, 9, 9], "area": 81, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    path = tmp_path / "bench.json"
    arguments = ["bench", "--card", "--models", f"tiny,{model}", "--val2017", str(tmp_path), "--image-size", "64"]
    assert main([*arguments, "--rounds", "1", "--warmup", "1", "--device", "cpu", "--json", str(path)]) == 0
    random, trained = json.loads(path.read_text())["measurements"][0]["result"]
    assert random["metrics"] is None
    assert 0 <= trained["metrics"]["AP"] <= 1


def test_a_folder_without_pictures_exits_4_before_any_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddetr_cli.bench.run.run_bench", lambda *_, **__: pytest.fail("measured"))
    assert main([*SMALL, "--folder", str(tmp_path)]) == 4
    assert "no image found" in capsys.readouterr().err


def test_a_json_file_in_a_folder_that_is_not_there_exits_7_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddetr_cli.bench.run.run_bench", lambda *_, **__: pytest.fail("measured"))
    assert main([*SMALL, "--json", str(tmp_path / "absent" / "bench.json")]) == 7
    assert "bench.json" in capsys.readouterr().err


def test_a_device_that_is_not_there_exits_8(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL[:-1], "cuda:999"]) == 8
    assert "cuda:999" in capsys.readouterr().err


def test_the_allocator_in_force_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddetr_cli.bench.allocator import TUNABLES, TUNED

    monkeypatch.setenv(TUNABLES, TUNED)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("started again"))
    assert main([*SMALL, "--sizes", "--allocator", "tuned"]) == 0
