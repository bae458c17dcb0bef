from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.classes import ClassTable
from ddetr_cli.cli.app import main
from ddetr_cli.inference.preparation import Preparation
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import get_preset
from ddetr_cli.weights import save_checkpoint

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
GOLDEN = {
    "cocoapi100": ["--annotations", "eval_golden/cocoapi100_gt.json"],
    "sahi": ["--annotations", "eval_golden/sahi_gt.json"],
    "coco_val80/instances": ["coco_val80"],
    "bccd/test": ["bccd", "--split", "test"],
    "photos/trees": ["photos", "--split", "trees"],
}


def document() -> dict[str, Any]:
    """Two images of 96x64 with one large-ish box each."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 96, "height": 64} for i in (1, 2)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 5 * i, "bbox": [8, 8, 40, 40], "area": 1600, "iscrowd": 0}
            for i in (1, 2)
        ],
        "categories": [{"id": 5, "name": "disc"}, {"id": 10, "name": "square"}],
    }


def results() -> list[dict[str, Any]]:
    """Everything found, exactly."""
    return [{"image_id": i, "category_id": 5 * i, "bbox": [8, 8, 40, 40], "score": 0.9} for i in (1, 2)]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    (root / "annotations/val.json").write_text(json.dumps(document()))
    for index in (1, 2):
        noise = np.random.default_rng(index).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"images/{index}.png")
    (root / "results.json").write_text(json.dumps(results()))
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights that knows the data set's two classes."""
    torch.manual_seed(0)
    config = get_preset("tiny", classes=2, queries=20, image_size=64)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_checkpoint(path, build_detector(config), ClassTable((5, 10), ("disc", "square")))
    return path


@pytest.mark.parametrize("name", GOLDEN)
def test_eval_reproduces_published_results_from_the_command_line(data_dir: Path, tmp_path: Path, name: str) -> None:
    arguments = [str(data_dir / a) if (data_dir / a).exists() else a for a in GOLDEN[name]]
    file = data_dir / "eval_golden" / f"{name.replace('/', '_')}_results.json"
    assert main(["eval", *arguments, "--predictions", str(file), "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    golden = json.loads((data_dir / "eval_golden/golden.json").read_text())["metrics"][name]
    for metric in METRICS:
        expected = None if golden[metric] == -1 else pytest.approx(golden[metric], abs=1e-6)  # six digits are given
        assert found[metric] == expected
    assert json.loads((tmp_path / "out/detections.json").read_text()) == [
        {key: row[key] for key in ("image_id", "category_id", "bbox", "score")}
        for row in json.loads(file.read_text())
    ]


def test_perfect_predictions_score_1_on_stdout_and_in_the_file(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/out"
    arguments = ["eval", str(dataset), "--predictions", str(dataset / "results.json"), "--per-class", "-o", str(out)]
    assert main(arguments) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["AP", "0.50:0.95", "all", "100", "1.000000"] in printed
    assert ["APl", "0.50:0.95", "large", "100", "n/a"] in printed
    assert [line[0] for line in printed if line[0] in METRICS] == METRICS
    assert ["disc", "1.000000", "1.000000", "1.000000", "n/a", "1.000000", "n/a", "1.000000"] in printed
    written = json.loads((out / "metrics.json").read_text())
    assert list(written) == [*METRICS, "images", "detections", "per_class"]
    assert (written["AP"], written["APs"], written["APm"]) == (pytest.approx(1), None, pytest.approx(1))
    assert (written["images"], written["detections"]) == (2, 2)
    assert list(written["per_class"]) == ["disc", "square"]
    assert list(written["per_class"]["disc"]) == METRICS
    assert sorted(path.name for path in out.iterdir()) == ["detections.json", "metrics.json"]


def test_annotations_alone_are_enough_for_predictions(dataset: Path) -> None:
    files = ["--annotations", str(dataset / "annotations/val.json"), "--predictions", str(dataset / "results.json")]
    assert main(["eval", *files]) == 0


def test_scoring_predictions_needs_no_torch(dataset: Path) -> None:
    code = (
        "import sys; from ddetr_cli.cli.app import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    arguments = ["eval", str(dataset), "--predictions", str(dataset / "results.json")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_empty_list_of_predictions_scores_0_with_a_warning(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset / "results.json").write_text("[]")
    out = tmp_path / "out"
    assert main(["eval", str(dataset), "--predictions", str(dataset / "results.json"), "-o", str(out)]) == 0
    assert "warning" in capsys.readouterr().err
    assert json.loads((out / "metrics.json").read_text())["AP"] == 0
    assert json.loads((out / "detections.json").read_text()) == []


def test_predictions_of_another_data_set_exit_6_naming_ids(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "results.json").write_text(json.dumps([results()[0] | {"image_id": 77}]))
    assert main(["eval", str(dataset), "--predictions", str(dataset / "results.json")]) == 6
    error = capsys.readouterr().err
    assert "ddetr: error: " in error
    assert "(77)" in error


def test_nan_predictions_exit_6_instead_of_scoring_1(dataset: Path) -> None:
    (dataset / "results.json").write_text(json.dumps([results()[0] | {"bbox": [float("nan")] * 4}]))
    assert main(["eval", str(dataset), "--predictions", str(dataset / "results.json")]) == 6


def test_a_broken_annotation_file_exits_6_and_a_repaired_one_is_told(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = document()
    for annotation in content["annotations"]:
        del annotation["area"]
    (dataset / "annotations/val.json").write_text(json.dumps(content))
    assert main(["eval", str(dataset), "--predictions", str(dataset / "results.json")]) == 0
    assert "2 of 2 annotations: area missing, filled with w*h" in capsys.readouterr().err
    (dataset / "annotations/val.json").write_text(json.dumps(content)[:50])
    assert main(["eval", str(dataset), "--predictions", str(dataset / "results.json")]) == 6
    assert "line 1, column" in capsys.readouterr().err


def test_limit_scores_only_the_first_images(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = [str(dataset), "--predictions", str(dataset / "results.json")]
    assert main(["eval", *files, "--limit", "1", "-o", str(out)]) == 0
    written = json.loads((out / "metrics.json").read_text())
    assert (written["images"], written["detections"]) == (1, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no/such/folder"],
        ["DATA", "--split", "nothing"],
        ["DATA", "--predictions", "RESULTS", "--model", "tiny"],
        ["DATA", "--predictions", "no-such-results.json"],
        ["DATA", "--model", ""],
        ["DATA", "--device", "tpu"],
        ["DATA", "--preset", "huge"],
        ["DATA", "--precision", "fp8"],
        ["DATA", "--preprocess", "theirs"],
        ["DATA", "--batch-size", "0"],
        ["DATA", "--image-size", "-1"],
        ["DATA", "--limit", "0"],
        ["DATA", "--bootstrap", "1"],
        ["DATA", "--evaluator", "theirs"],
        ["DATA", "--predictions", "RESULTS", "--report"],
        ["DATA", "--predictions", "RESULTS", "--predictions", "RESULTS"],
        ["DATA", "--predictions", "RESULTS", "--images", "DATA", "--images", "DATA/images"],
        ["DATA", "--predictions", "RESULTS", "--images", "RESULTS", "--images", "DATA/annotations/val.json"],
        ["DATA", "--map-missing", "maybe"],
        ["--annotations", "DATA/annotations/val.json"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_exits_2(dataset: Path, arguments: list[str]) -> None:
    places = {"RESULTS": str(dataset / "results.json"), "DATA": str(dataset)}
    assert main(["eval", *(places.get(a, a.replace("DATA/", f"{dataset}/")) for a in arguments)]) == 2


def test_an_output_that_exists_is_refused_before_any_work_unless_overwritten(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["eval", str(dataset), "--predictions", str(dataset / "results.json"), "-o", str(out)]
    assert main(arguments) == 0
    before = (out / "metrics.json").read_text()
    (dataset / "results.json").write_text("[]")
    assert main(arguments) == 7
    assert (out / "metrics.json").read_text() == before
    assert main([*arguments, "--overwrite"]) == 0
    assert (out / "metrics.json").read_text() != before
    assert main(["eval", str(dataset), "--model", "no-such-model", "-o", str(dataset / "results.json")]) == 2


def test_a_model_is_scored_and_its_detections_score_the_same_from_the_file(
    dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["eval", str(dataset), "--model", str(checkpoint), "-o", str(out), "--device", "cpu"]) == 0
    assert "model class" not in capsys.readouterr().err  # equal ids and names: no mapping to tell
    detections = json.loads((out / "detections.json").read_text())
    assert len(detections) == 2 * 2 * 20  # every query and class of both images
    assert {row["category_id"] for row in detections} == {5, 10}
    again = tmp_path / "again"
    arguments = ["eval", str(dataset), "--predictions", str(out / "detections.json"), "-o", str(again)]
    assert main(arguments) == 0
    assert (again / "metrics.json").read_bytes() == (out / "metrics.json").read_bytes()
    assert (again / "detections.json").read_bytes() == (out / "detections.json").read_bytes()


def test_detections_do_not_depend_on_the_batch_size(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    common = ["eval", str(dataset), "--model", str(checkpoint), "--device", "cpu"]
    for size in ("1", "2"):
        assert main([*common, "--batch-size", size, "-o", str(tmp_path / size)]) == 0
    assert (tmp_path / "1/detections.json").read_bytes() == (tmp_path / "2/detections.json").read_bytes()


def test_other_ids_are_mapped_by_name_and_an_unknown_class_exits_6_unless_dropped(
    dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = document()
    content["categories"] = [{"id": 5, "name": "ring"}, {"id": 10, "name": "disc"}]
    (dataset / "annotations/val.json").write_text(json.dumps(content))
    arguments = ["eval", str(dataset), "--model", str(checkpoint), "--device", "cpu", "-o", str(tmp_path / "out")]
    assert main(arguments) == 6
    error = capsys.readouterr().err
    assert 'model class 0 "disc" -> category 10 "disc"' in error
    assert "class 'square'" in error
    assert main([*arguments, "--map-missing", "drop"]) == 0
    assert "40 detections of classes without a counterpart left out" in capsys.readouterr().err
    detections = json.loads((tmp_path / "out/detections.json").read_text())
    assert {row["category_id"] for row in detections} == {10}


def test_a_model_of_other_classes_exits_5_and_names_both(
    dataset: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = document()
    content["categories"] = [{**category, "name": f"not {category['name']}"} for category in content["categories"]]
    (dataset / "annotations/val.json").write_text(json.dumps(content))
    assert main(["eval", str(dataset), "--model", str(checkpoint), "--device", "cpu"]) == 5
    assert (
        "categories: none of the data set's (not disc, not square) is a class of the model (disc, square). "
        "Give a model trained on them." in capsys.readouterr().err
    )


def test_missing_and_unreadable_images_exit_6(
    dataset: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(dataset), "--model", str(checkpoint), "--device", "cpu"]
    (dataset / "images/2.png").write_bytes(b"")
    assert main(arguments) == 6
    assert "2.png" in capsys.readouterr().err
    (dataset / "images/2.png").unlink()
    assert main(arguments) == 6
    assert "1 of 2 images" in capsys.readouterr().err


def test_a_missing_model_exits_5(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["eval", str(dataset), "--device", "cpu"]) == 5


def test_preprocess_chooses_whose_size_rule_prepares_the_pictures(
    dataset: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules: list[str] = []
    prepare = Preparation.__call__

    def note(self: Preparation, *arguments: Any) -> Any:
        rules.append(self.preprocess)
        return prepare(self, *arguments)

    monkeypatch.setattr(Preparation, "__call__", note)
    for rule in ("original", "hf"):
        assert main(["eval", str(dataset), "-m", str(checkpoint), "--device", "cpu", "--preprocess", rule]) == 0
    assert rules == ["original", "original", "hf", "hf"]


def scored(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What metrics.json says of a run that ends well."""
    out = tmp_path / "scored"
    assert main(["eval", *arguments, "-o", str(out), "--overwrite"]) == 0
    return dict(json.loads((out / "metrics.json").read_text()))


@pytest.mark.parametrize("name", GOLDEN)
def test_both_evaluators_write_the_same_bytes(data_dir: Path, tmp_path: Path, name: str) -> None:
    arguments = [str(data_dir / a) if (data_dir / a).exists() else a for a in GOLDEN[name]]
    file = data_dir / "eval_golden" / f"{name.replace('/', '_')}_results.json"
    for evaluator in ("fast", "pycocotools"):
        more = ["--evaluator", evaluator, "--per-class", "-o", str(tmp_path / evaluator)]
        assert main(["eval", *arguments, "--predictions", str(file), *more]) == 0
    assert (tmp_path / "fast/metrics.json").read_bytes() == (tmp_path / "pycocotools/metrics.json").read_bytes()


def test_the_parts_of_a_result_score_as_the_whole(dataset: Path, tmp_path: Path) -> None:
    parts = []
    for index, row in enumerate(results()):
        (tmp_path / f"{index}.json").write_text(json.dumps([row]))
        parts += ["--predictions", str(tmp_path / f"{index}.json")]
    whole = scored(tmp_path, str(dataset), "--predictions", str(dataset / "results.json"))
    assert scored(tmp_path, str(dataset), *parts) == whole


def test_a_list_of_images_chooses_what_is_scored(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("2.png\n")
    arguments = [str(dataset), "--predictions", str(dataset / "results.json"), "--images", str(tmp_path / "list.txt")]
    found = scored(tmp_path, *arguments)
    assert (found["images"], found["detections"]) == (1, 1)
    assert "(1 of 2 images)" in capsys.readouterr().err


def test_a_list_and_a_folder_of_images_can_both_be_given(
    dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "list.txt").write_text("1\n")
    places = ["--images", str(tmp_path / "elsewhere"), "--images", str(tmp_path / "list.txt")]
    found = scored(tmp_path, str(dataset), *places, "-m", str(checkpoint), "--device", "cpu")
    assert (found["images"], found["detections"]) == (1, 40)
    assert main(["eval", str(dataset), "--images", str(dataset / "results.json")]) == 6  # names no image
    assert "lines name no image" in capsys.readouterr().err


def test_results_of_a_run_that_was_cut_short_are_refused_unless_allowed(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset / "results.json").write_text(json.dumps(results()[:1]))
    arguments = [str(dataset), "--predictions", str(dataset / "results.json")]
    assert main(["eval", *arguments]) == 6
    assert "nothing was found in 1 of the 2 images that hold objects" in capsys.readouterr().err
    assert scored(tmp_path, *arguments, "--allow-partial")["AP"] == pytest.approx(0.5)
    assert "they count as missed" in capsys.readouterr().err
    assert scored(tmp_path, *arguments, "--limit", "1")["AP"] == pytest.approx(1)


def test_detections_past_the_limit_of_100_are_told(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "results.json").write_text(json.dumps(results() + results()[:1] * 104))
    assert main(["eval", str(dataset), "--predictions", str(dataset / "results.json")]) == 0
    assert "5 detections past the 100 best of their image and class are not scored" in capsys.readouterr().err


def test_bootstrap_adds_an_interval_to_every_number(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(dataset), "--predictions", str(dataset / "results.json"), "--bootstrap", "10"]
    found = scored(tmp_path, *arguments)
    assert list(found["intervals"]) == METRICS
    assert found["intervals"]["AP"] == [pytest.approx(1), pytest.approx(1)]
    assert found["intervals"]["APs"] is None
    assert "1.0000 to 1.0000" in capsys.readouterr().out
    assert scored(tmp_path, *arguments) == found


def test_two_processes_score_as_one(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    content = document()
    for index in (3, 4, 5):  # one process gets an image more
        content["images"].append(content["images"][0] | {"id": index, "file_name": f"{index}.png"})
        content["annotations"].append(content["annotations"][0] | {"id": index, "image_id": index})
        noise = np.random.default_rng(index).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(dataset / f"images/{index}.png")
    (dataset / "annotations/val.json").write_text(json.dumps(content))
    arguments = ["eval", str(dataset), "--model", str(checkpoint), "--device", "cpu", "--per-class", "-o"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; from ddetr_cli.cli.app import main; sys.exit(main(sys.argv[1:]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments, str(tmp_path / "two")],
            env=os.environ
            | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[1] == ("", "")  # one of them talks
    for name in ("detections.json", "metrics.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_boxes_that_overlap_a_better_one_of_their_class_are_not_scored_when_asked(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = [{**row, "bbox": [9, 8, 40, 40], "score": 0.95} for row in results()]
    (dataset / "twice.json").write_text(json.dumps(results() + twice))
    for name, options in (("as", []), ("nms", ["--nms", "0.7"]), ("loose", ["--nms", "0.99"])):
        arguments = ["eval", str(dataset), "--predictions", str(dataset / "twice.json"), "-o", str(tmp_path / name)]
        assert main([*arguments, *options]) == 0
    assert "2 of 4 detections overlap a better one and are left out (--nms)" in capsys.readouterr().err
    found = {name: json.loads((tmp_path / name / "detections.json").read_text()) for name in ("as", "nms", "loose")}
    assert (found["nms"], found["loose"]) == (twice, found["as"])
    assert json.loads((tmp_path / "nms/metrics.json").read_text())["nms"] == 0.7
    assert "nms" not in json.loads((tmp_path / "as/metrics.json").read_text())


def test_what_suppression_leaves_of_a_model_is_what_it_leaves_of_its_results(
    dataset: Path, checkpoint: Path, tmp_path: Path
) -> None:
    model = ["--model", str(checkpoint), "--device", "cpu"]
    assert main(["eval", str(dataset), *model, "-o", str(tmp_path / "all")]) == 0
    assert main(["eval", str(dataset), *model, "-o", str(tmp_path / "some"), "--nms", "0.02"]) == 0
    predictions = ["--predictions", str(tmp_path / "all/detections.json"), "--nms", "0.02"]
    assert main(["eval", str(dataset), *predictions, "-o", str(tmp_path / "later")]) == 0
    every, some, later = ((tmp_path / name / "detections.json").read_bytes() for name in ("all", "some", "later"))
    assert later == some
    assert 0 < len(some) < len(every)


def test_suppression_is_no_part_of_a_comparison(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(dataset / "results.json")
    assert main(["eval", str(dataset), "--compare", file, file, "--nms", "0.7"]) == 2
    assert "--nms: not with --compare" in capsys.readouterr().err
    assert main(["eval", str(dataset), "--predictions", file, "--nms", "1.5"]) == 2


def test_a_report_is_written_beside_the_numbers(
    dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["eval", str(dataset), "-m", str(checkpoint), "--device", "cpu", "--report", "-o", str(out)]
    assert main(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == ["detections.json", "metrics.json", "plots", "report.html"]
    page = (out / "report.html").read_text()
    assert "<h1>tiny.safetensors on data, val</h1>" in page
    assert page.count("data:image/jpeg") == 2
    assert str(out / "report.html") in capsys.readouterr().err


def test_a_report_without_matplotlib_is_refused_before_any_work(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    arguments = ["eval", str(dataset), "--predictions", str(dataset / "results.json"), "--report"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
