from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.cli.app import main
from ddetr_cli.cli.eval_compare import results_file, run_name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Annotations of three objects in two images, and the results of two runs: everything, and half of it."""
    rows = [(1, 1, [8, 8, 40, 40]), (1, 2, [50, 8, 40, 40]), (2, 1, [8, 8, 40, 40])]
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 96, "height": 64} for i in (1, 2)],
        "annotations": [
            {"id": n + 1, "image_id": i, "category_id": c, "bbox": b, "area": 1600, "iscrowd": 0}
            for n, (i, c, b) in enumerate(rows)
        ],
        "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}],
    }
    results = [{"image_id": i, "category_id": c, "bbox": b, "score": 0.9} for i, c, b in rows]
    (tmp_path / "truth.json").write_text(json.dumps(document))
    (tmp_path / "all.json").write_text(json.dumps(results))
    (tmp_path / "half.json").write_text(json.dumps(results[::2]))
    return tmp_path


def arguments(data: Path, first: str = "half.json", second: str = "all.json") -> list[str]:
    runs = [str(data / first), str(data / second)]
    return ["eval", "--annotations", str(data / "truth.json"), "--compare", *runs]


def test_two_runs_are_printed_beside_each_other(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(data), "--per-class"]) == 0
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert ["metric", "half.json", "all.json", "difference"] in lines
    assert ["AP", "0.500000", "1.000000", "+0.500000"] in lines
    assert ["APl", "n/a", "n/a", "n/a"] in lines
    assert ["missed", "50.00", "0.00", "-50.00"] in lines
    assert ["square", "0.000000", "1.000000", "+1.000000"] in lines
    assert "objects found by half.json alone: 0, by all.json alone: 1" in printed.err


def test_what_changed_is_written_with_its_page(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data / "out"
    assert main([*arguments(data), "-o", str(out), "--report", "--bootstrap", "10"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "comparison.json", "plots"]
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    assert (found["first"]["AP"], found["second"]["AP"]) == (pytest.approx(0.5), pytest.approx(1))
    assert found["difference"]["AP"] == pytest.approx(0.5)
    assert found["objects_found_by_second_only"] == 1
    assert len(found["intervals"]["AP"]) == 2
    assert "95 % interval" in capsys.readouterr().out


def test_the_folder_of_a_run_stands_for_its_detections(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--annotations", str(data / "truth.json"), "--predictions", str(data / "all.json")]
    assert main(["eval", *files, "-o", str(data / "run")]) == 0
    assert main(arguments(data, "run", "run")) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["metric", "A", "B", "difference"] in lines  # of one name they need others
    assert results_file(data / "run") == data / "run/detections.json"


@pytest.mark.parametrize(
    "more", [["--model", "tiny"], ["--predictions", "all.json"], ["--report"]], ids=["model", "predictions", "report"]
)
def test_what_cannot_be_compared_exits_2(data: Path, more: list[str]) -> None:
    assert main([*arguments(data), *more]) == 2


def test_a_run_that_is_not_there_exits_2(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(data, second="none.json")) == 2
    assert "none.json: no such results file" in capsys.readouterr().err


def test_a_run_is_called_by_the_name_that_tells_it_from_others(tmp_path: Path) -> None:
    for name in ("run/best.safetensors", "scores/detections.json", "results.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert run_name(tmp_path / "run/best.safetensors") == "run/best.safetensors"
    assert run_name(tmp_path / "scores/detections.json") == "scores/detections.json"
    assert run_name(tmp_path / "results.json") == "results.json"
    assert run_name(Path("demo")) == "demo"
    assert run_name(Path("SenseTime/deformable-detr")) == "SenseTime/deformable-detr"
