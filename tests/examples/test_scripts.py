"""Every example is run as its reader would run it, with small inputs and an untrained model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"

QUERIES, CLASSES = 6, ("circle", "square")  # of the model
ROWS_PER_IMAGE = QUERIES * len(CLASSES)


def run(command: list[str | Path], environment: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], env={**environment, **more}, capture_output=True, text=True, timeout=300
    )  # fmt: skip


def test_detect_folder_counts_what_was_found(
    environment: dict[str, str], model: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run(
        [EXAMPLES / "detect_folder.sh", pictures, out], environment, MODEL=str(model), THRESHOLD="0"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = {name: int(count) for count, name in (line.split() for line in done.stdout.splitlines()[-2:])}
    assert counts == dict.fromkeys(CLASSES, 2 * ROWS_PER_IMAGE // 2)


def test_detect_folder_goes_on_after_a_bad_picture_and_says_so(
    environment: dict[str, str], model: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.png").write_bytes((pictures / "a.png").read_bytes())
    (folder / "bad.png").write_bytes(b"no picture")
    done = run(
        [EXAMPLES / "detect_folder.sh", folder, tmp_path / "out"], environment, MODEL=str(model), THRESHOLD="0"
    )
    assert done.returncode == 0, done.stderr
    assert "could not be read" in done.stderr
    assert "bad.png" in done.stderr


def test_detect_folder_ends_with_the_exit_code_of_ddetr(
    environment: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    page = tmp_path / "model.pth"
    page.write_text("<html>")
    done = run([EXAMPLES / "detect_folder.sh", pictures, tmp_path / "out"], environment, MODEL=str(page))
    assert done.returncode == 5


def test_find_objects_prints_what_the_command_writes_and_goes_on_after_a_bad_picture(
    environment: dict[str, str], model: Path, pictures: Path, tmp_path: Path
) -> None:
    out, boxed = tmp_path / "out", tmp_path / "boxed"
    done = run(["ddetr", "detect", pictures, "--model", model, "--threshold", "0", "--output", out], environment)
    assert done.returncode == 0, done.stderr
    (tmp_path / "bad.png").write_bytes(b"no picture")
    inputs = [pictures / "a.png", tmp_path / "bad.png", pictures / "b.png"]
    options = ["--model", model, "--threshold", "0", "--output", boxed]
    done = run(["python3", EXAMPLES / "find_objects.py", *inputs, *options], environment)
    assert done.returncode == 1
    assert "bad.png: not an image" in done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 2 * ROWS_PER_IMAGE
    assert {row[0] for row in rows} == {str(pictures / "a.png"), str(pictures / "b.png")}
    detections = json.loads((out / "detections.json").read_text())
    assert [row[2] for row in rows] == [f"{found['score']:.3f}" for found in detections]
    assert [int(row[3]) for row in rows] == [round(found["bbox"][0]) for found in detections]
    assert sorted(path.name for path in boxed.iterdir()) == ["a.png", "b.png"]


def test_the_program_in_the_readme_prints_a_line_for_every_object(environment: dict[str, str]) -> None:
    program = (EXAMPLES / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        ["python3", "-c", program], env=environment, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} >= {"circle", "ring"}


def test_count_objects_counts_only_scores_from_the_threshold_on(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "images.json").write_text(
        json.dumps({"categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]})
    )
    scores = [(7, 0.9), (7, 0.5), (7, 0.49), (9, 0.8), (9, 0.1)]
    (tmp_path / "detections.json").write_text(json.dumps([{"category_id": c, "score": s} for c, s in scores]))
    done = run(["python3", EXAMPLES / "count_objects.py", tmp_path], environment)
    assert done.stdout.split() == ["2", "cat", "1", "dog"]


def test_train_on_scenes_ends_with_the_scores_of_a_trained_model(environment: dict[str, str], tmp_path: Path) -> None:
    work = tmp_path / "work"
    options = ["--epochs", "1", "--image-size", "64", "--batch-size", "2", "--device", "cpu"]
    done = run([EXAMPLES / "train_on_scenes.sh", work, *options], environment, TRAIN="4", VAL="2")
    assert done.returncode == 0, done.stderr
    assert (work / "run" / "best.safetensors").is_file()
    assert {"AP", "AP50", "per_class"} <= set(json.loads((work / "scores" / "metrics.json").read_text()))


@pytest.mark.slow
def test_convergence_trains_both_methods_alike_and_draws_what_their_metrics_say(
    environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'ddetr-cli[plots]'")
    work = tmp_path / "work"
    options = ["--epochs", "1", "--image-size", "64", "--device", "cpu"]
    done = run([EXAMPLES / "convergence.sh", work, *options], environment, TRAIN="4", VAL="2")
    assert done.returncode == 0, done.stderr
    with Image.open(work / "convergence.png") as picture:
        assert picture.width > 2 * picture.height
    *_, heading, ours, theirs, path = done.stdout.splitlines()
    assert heading.split()[:3] == ["preset", "epochs", "AP"] and path == str(work / "convergence.png")
    for line, preset in ((ours, "tiny-plain"), (theirs, "detr-tiny")):
        row = json.loads((work / preset / "metrics.jsonl").read_text())
        assert line.split()[:3] == [preset, "1", f"{row['val']['AP']:.3f}"]
    recipes = [
        json.loads((work / preset / "config.json").read_text())["recipe"] for preset in ("tiny-plain", "detr-tiny")
    ]
    assert recipes[0] == recipes[1]

    again = run([EXAMPLES / "convergence.sh", work, *options], environment, TRAIN="4", VAL="2")
    assert again.returncode == 0 and "Nothing is left to train" in again.stderr
    assert again.stdout.splitlines()[-3:-1] == [ours, theirs]


@pytest.mark.parametrize("name", ["detect_folder.sh", "train_on_scenes.sh", "convergence.sh", "find_objects.py"])
def test_an_example_without_arguments_says_how_it_is_used(name: str, environment: dict[str, str]) -> None:
    script = EXAMPLES / name
    done = run([script] if name.endswith(".sh") else ["python3", script], environment)
    assert done.returncode != 0
    assert "usage:" in done.stderr


def test_shrink_checkpoint_halves_a_model_that_still_loads(
    model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    from ddetr_cli.weights import load_model

    small = tmp_path / "small.safetensors"
    done = run([EXAMPLES / "shrink_checkpoint.py", model, small], environment)
    assert done.returncode == 0, done.stderr
    assert small.stat().st_size < 0.55 * model.stat().st_size
    assert load_model(str(small)).classes.names == CLASSES


def test_every_example_is_in_the_table_of_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert files
    assert [name for name in files if f"`{name}`" not in readme] == []
