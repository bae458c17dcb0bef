from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.cli.app import main
from ddetr_cli.data.pixels import network_size
from ddetr_cli.inference.predictor import Predictor


def detect(model: str, *arguments: object) -> int:
    return main(["detect", "--model", model, "--device", "cpu", *map(str, arguments)])


def detections_in(output: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((output / "detections.json").read_text())
    return rows


def images_in(output: Path) -> list[dict[str, object]]:
    images: list[dict[str, object]] = json.loads((output / "images.json").read_text())["images"]
    return images


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_detect_writes_results_images_and_a_mirrored_tree_and_keeps_stdout_empty(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert detect(model, photos, "--output", output, "--threshold", 0) == 0
    assert files_in(output) == [
        "annotated/a.jpg",
        "annotated/sub/b.png",
        "annotated/sub/c.tif.jpg",
        "detections.json",
        "images.json",
        "journal.jsonl",
        "run.json",
    ]
    assert [(i["id"], i["file_name"], i["width"], i["height"]) for i in images_in(output)] == [
        (1, "a.jpg", 64, 48),
        (2, "sub/b.png", 48, 64),
        (3, "sub/c.tif", 80, 60),
    ]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "300 detections in 3 images" in captured.err
    assert "processed 3, failed 0, skipped 0" in captured.err
    assert "\x1b" not in captured.err


def test_threshold_0_writes_a_hundred_rows_per_image_exactly_as_the_library_gives_them(
    model: str, photos: Path, tmp_path: Path
) -> None:
    from ddetr_cli.data.images import read_image
    from ddetr_cli.weights import load_model

    assert detect(model, photos, "-o", tmp_path / "out", "-t", 0, "-q") == 0
    rows = detections_in(tmp_path / "out")
    assert [row["image_id"] for row in rows] == [1] * 100 + [2] * 100 + [3] * 100
    assert {row["category_id"] for row in rows} <= {1, 2, 7}
    found = Predictor(load_model(model), device="cpu").predict([read_image(photos / "a.jpg")])[0]
    first = [row for row in rows if row["image_id"] == 1]
    assert torch.equal(torch.tensor([row["score"] for row in first]), found.scores)
    boxes = torch.tensor([row["bbox"] for row in first])
    boxes[:, 2:] += boxes[:, :2]
    assert torch.allclose(boxes, found.boxes_xyxy_px, atol=2e-4)  # written to 1e-4 px


def test_pycocotools_loads_what_detect_writes(model: str, photos: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    assert detect(model, photos, "-o", tmp_path / "out", "-t", 0, "-q") == 0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "out/images.json"))  # type: ignore[no-untyped-call]
        results = truth.loadRes(str(tmp_path / "out/detections.json"))  # type: ignore[no-untyped-call]
        COCOeval(truth, results, "bbox").evaluate()  # type: ignore[no-untyped-call]
    assert len(results.anns) == 300


def test_the_threshold_decides_what_is_kept(model: str, photos: Path, tmp_path: Path) -> None:
    assert detect(model, photos, "-o", tmp_path / "all", "-t", 0, "-q") == 0
    every = detections_in(tmp_path / "all")
    limit = sorted(float(str(row["score"])) for row in every)[150]
    assert detect(model, photos, "-o", tmp_path / "some", "-t", limit, "-q") == 0
    assert detections_in(tmp_path / "some") == [row for row in every if float(str(row["score"])) >= limit]


def test_no_detection_at_all_is_a_valid_empty_result(model: str, photos: Path, tmp_path: Path) -> None:
    assert detect(model, photos, "-o", tmp_path / "out", "-t", 1, "-q") == 0
    assert detections_in(tmp_path / "out") == []
    assert len(images_in(tmp_path / "out")) == 3


def test_results_are_byte_identical_whatever_the_batch_size_and_the_neighbours(
    model: str, photos: Path, tmp_path: Path
) -> None:
    for batch_size in (1, 2, 64):
        assert detect(model, photos, "-o", tmp_path / f"{batch_size}", "-t", 0, "-q", "-b", batch_size) == 0
    texts = {(tmp_path / f"{batch_size}/detections.json").read_bytes() for batch_size in (1, 2, 64)}
    assert len(texts) == 1
    assert detect(model, photos / "sub/b.png", "-o", tmp_path / "alone", "-t", 0, "-q") == 0
    alone = [{**row, "image_id": 2} for row in detections_in(tmp_path / "alone")]
    assert alone == [row for row in detections_in(tmp_path / "1") if row["image_id"] == 2]


def test_an_unreadable_image_is_named_and_passed_over_with_exit_3(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(model, photos, "-o", tmp_path / "good", "-t", 0, "-q") == 0
    (photos / "b.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "notes.txt").write_bytes(b"")
    assert detect(model, photos, "-o", tmp_path / "out", "-t", 0) == 3
    err = capsys.readouterr().err
    assert f"ddetr: error: {photos / 'b.jpg'}: damaged image" in err
    assert "processed 3, failed 1, skipped 1" in err
    failed = [image for image in images_in(tmp_path / "out") if "failed" in image]
    assert [(image["id"], image["file_name"], image["width"]) for image in failed] == [(2, "b.jpg", None)]
    assert str(failed[0]["failed"]).startswith("damaged image")
    # the others have the results they had, under ids that count the bad one
    moved = {1: 1, 2: 3, 3: 4}
    expected = [{**row, "image_id": moved[int(str(row["image_id"]))]} for row in detections_in(tmp_path / "good")]
    assert detections_in(tmp_path / "out") == expected


def test_when_every_image_is_bad_the_results_are_empty_and_the_exit_code_4(model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, content in {"zero.jpg": b"", "text.png": b"hello", "nul.jpg": bytes(1000)}.items():
        (tmp_path / "in" / name).write_bytes(content)
    assert detect(model, tmp_path / "in", "-o", tmp_path / "out") == 4
    assert detections_in(tmp_path / "out") == []
    assert ["failed" in image for image in images_in(tmp_path / "out")] == [True] * 3


@pytest.mark.parametrize(
    "options",
    [
        ["--threshold", "1.5"],
        ["--threshold", "-0.1"],
        ["--threshold", "nan"],
        ["--threshold", "much"],
        ["--threshold", "cat=1.5"],
        ["--threshold", "=0.5"],
        ["--classes", ","],
        ["--top-k", "0"],
        ["--nms", "0"],
        ["--nms", "1"],
        ["--nms", "nan"],
        ["--tiles", "31"],
        ["--tile-overlap", "0.95"],
        ["--batch-size", "0"],
        ["--batch-size", "-3"],
        ["--batch-size", "1000000000"],
        ["--image-size", "0"],
        ["--max-pixels", "0"],
        ["--read-timeout", "-1"],
        ["--precision", "int8"],
        ["--device", "gpu"],
        ["--device", ""],
        ["--format", "coco,xml"],
        ["--output", "-"],
        ["--output", "-", "--format", "csv,jsonl"],
        ["--output", "-", "--format", "yolo"],
        ["--format", ""],
        ["--preset", "r51"],
        ["--output", ""],
        ["--model", ""],
        ["--quiet", "--verbose"],
    ],
)
def test_an_impossible_option_exits_2_before_the_model_is_looked_for(
    options: list[str],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["detect", str(photos), "--model", "no-such-model.pth", *options]) == 2
    assert "ddetr: error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_order_of_refusals_is_sources_then_output_then_model(photos: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_bytes(b"")
    assert main(["detect", str(tmp_path / "none"), "-o", str(full), "--model", "no-such.pth"]) == 2
    assert main(["detect", str(photos), "-o", str(full), "--model", "no-such.pth"]) == 7
    assert main(["detect", str(photos), "-o", str(tmp_path / "out"), "--model", "no-such.pth"]) == 5
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert main(["detect", str(tmp_path / "empty"), "-o", str(full), "--model", "no-such.pth"]) == 4


def test_an_output_that_exists_is_refused_and_replaced_only_with_overwrite(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert detect(model, photos, "-o", output, "-q") == 0
    before = (output / "images.json").read_bytes()
    (photos / "sub/c.tif").unlink()
    assert detect(model, photos, "-o", output, "-q") == 7
    assert f"{output}: exists already" in capsys.readouterr().err
    assert (output / "images.json").read_bytes() == before
    assert detect(model, photos, "-o", output, "-q", "--overwrite") == 0
    assert files_in(output / "annotated") == ["a.jpg", "sub/b.png"]
    assert len(images_in(output)) == 2


def test_an_output_inside_the_input_is_never_an_input_and_no_input_changes(
    model: str, photos: Path, tmp_path: Path
) -> None:
    before = {name: (photos / name).read_bytes() for name in files_in(photos)}
    assert detect(model, photos, "-o", photos / "out", "-q") == 0
    assert detect(model, photos, "-o", photos / "out", "-q", "--overwrite") == 0
    assert detect(model, photos, "-o", photos, "-q", "--overwrite") == 0
    for output in (photos / "out", photos):
        assert [image["file_name"] for image in images_in(output)] == ["a.jpg", "sub/b.png", "sub/c.tif"]
    assert all((photos / name).read_bytes() == content for name, content in before.items())


def test_format_chooses_what_is_written(model: str, photos: Path, tmp_path: Path) -> None:
    assert detect(model, photos, "-o", tmp_path / "c", "-q", "--format", "coco") == 0
    assert files_in(tmp_path / "c") == ["detections.json", "images.json", "journal.jsonl", "run.json"]
    assert detect(model, photos, "-o", tmp_path / "i", "-q", "--format", "images") == 0
    assert files_in(tmp_path / "i" / "annotated") == ["a.jpg", "sub/b.png", "sub/c.tif.jpg"]
    assert not (tmp_path / "i" / "detections.json").exists()


def test_all_formats_in_one_run_tell_of_the_same_detections(model: str, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (photos / "bad.jpg").write_bytes(b"")
    kinds = "coco,jsonl,csv,yolo,images,crops,sheet"
    assert detect(model, photos, "-o", output, "-q", "-t", 0, "--format", kinds) == 3
    rows = detections_in(output)
    assert len(rows) == 300
    lines = [json.loads(line) for line in (output / "detections.jsonl").read_text().splitlines()]
    assert [line.get("failed", "")[:12] for line in lines] == ["", "not an image", "", ""]
    listed = [(line["image_id"], one["bbox"], one["score"]) for line in lines for one in line.get("detections", [])]
    assert listed == [(row["image_id"], row["bbox"], row["score"]) for row in rows]
    with (output / "detections.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["score"]) for row in table] == [row["score"] for row in rows]
    with (output / "failures.csv").open(newline="") as file:
        assert [row["file_name"] for row in csv.DictReader(file)] == ["bad.jpg"]
    assert files_in(output / "labels") == ["a.txt", "sub/b.txt", "sub/c.txt"]
    assert files_in(output / "annotated") == ["a.jpg", "sub/b.png", "sub/c.tif.jpg"]
    crops = files_in(output / "crops")
    inside = sum(len((output / "labels" / name).read_text().splitlines()) for name in files_in(output / "labels"))
    assert len(crops) >= inside > 250  # boxes of no area have a crop of one pixel, but no line
    assert crops == sorted(crops)
    with Image.open(output / "sheet.jpg") as sheet:
        assert sheet.width > 900
    assert not list(output.rglob(".ddetr-*"))


def test_crops_and_the_sheet_of_an_earlier_run_are_not_inputs(model: str, photos: Path, tmp_path: Path) -> None:
    for more in ([], ["--overwrite"]):
        assert detect(model, photos, "-o", photos / "out", "-q", "--format", "coco,crops,sheet", "-t", 0, *more) == 0
        assert [image["file_name"] for image in images_in(photos / "out")] == ["a.jpg", "sub/b.png", "sub/c.tif"]


@pytest.mark.parametrize("kind", ["coco", "jsonl", "csv"])
def test_a_dash_sends_the_results_to_stdout_and_nothing_else(
    kind: str,
    model: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert detect(model, photos, "-o", "file", "-q", "-t", 0, "--format", kind) == 0
    capfdbinary.readouterr()
    assert detect(model, photos, "-o", "-", "-t", 0, "--format", kind) == 0
    captured = capfdbinary.readouterr()
    (file,) = (path for path in Path("file").iterdir() if path.stem == "detections")
    assert captured.out == file.read_bytes()
    assert b"processed 3, failed 0, skipped 0" in captured.err
    assert b"results in" not in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in"]


def test_a_reader_of_stdout_that_goes_away_ends_the_run_without_a_word(
    model: str, photos: Path, tmp_path: Path, repository: Path
) -> None:
    entry = "import sys; from ddetr_cli.cli.app import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        entry,
        "detect",
        str(photos),
        "-m",
        model,
        "-q",
        "-t",
        "0",
        "-o",
        "-",
        "--format",
        "jsonl",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_classes_scores_and_numbers_choose_what_is_kept(model: str, photos: Path, tmp_path: Path) -> None:
    assert detect(model, photos, "-o", tmp_path / "all", "-t", 0, "-q") == 0
    every = detections_in(tmp_path / "all")
    limit = sorted(float(str(row["score"])) for row in every if row["category_id"] == 7)[20]
    options = ("-t", 0, "-t", f"7={limit}", "--classes", "cat,7")
    assert detect(model, photos, "-o", tmp_path / "some", "-q", *options) == 0
    expected = [
        row
        for row in every
        if row["category_id"] == 1 or (row["category_id"] == 7 and float(str(row["score"])) >= limit)
    ]
    assert detections_in(tmp_path / "some") == expected
    assert len({row["category_id"] for row in expected}) == 2
    assert detect(model, photos, "-o", tmp_path / "top", "-q", *options, "--top-k", 3) == 0
    by_image = [[row for row in expected if row["image_id"] == number][:3] for number in (1, 2, 3)]
    assert detections_in(tmp_path / "top") == [row for rows in by_image for row in rows]
    info = json.loads((tmp_path / "top/images.json").read_text())["info"]
    assert (info["threshold"], info["thresholds"], info["classes"], info["top_k"]) == (0, [[7, limit]], [1, 7], 3)


def test_one_class_per_box_keeps_every_box_once(model: str, photos: Path, tmp_path: Path) -> None:
    for name, more in (("all", []), ("one", ["--one-class-per-box"])):
        assert detect(model, photos, "-o", tmp_path / name, "-t", 0, "-q", *more) == 0
    every, once = (detections_in(tmp_path / name) for name in ("all", "one"))
    places = {(row["image_id"], tuple(row["bbox"])) for row in every}  # type: ignore[arg-type]
    assert len(once) == len(places) < len(every)
    best: dict[object, dict[str, object]] = {}
    for row in every:
        best.setdefault((row["image_id"], tuple(row["bbox"])), row)  # type: ignore[arg-type]
    assert once == list(best.values())


def test_boxes_that_overlap_a_better_one_of_their_class_are_left_out_when_asked(
    model: str, photos: Path, tmp_path: Path
) -> None:
    from ddetr_cli.inference.suppression import rows_without_overlaps

    assert detect(model, photos, "-o", tmp_path / "all", "-t", 0, "-q") == 0
    assert detect(model, photos, "-o", tmp_path / "some", "-t", 0, "-q", "--nms", 0.05) == 0
    expected = []
    for number in (1, 2, 3):
        rows = [row for row in detections_in(tmp_path / "all") if row["image_id"] == number]
        corners = np.array([row["bbox"] for row in rows])
        corners[:, 2:] += corners[:, :2]
        left = rows_without_overlaps(corners, [row["category_id"] for row in rows], 0.05)
        expected += [rows[index] for index in left]
    assert 200 < len(expected) < 290
    assert detections_in(tmp_path / "some") == expected
    run, images = (json.loads((tmp_path / "some" / name).read_text()) for name in ("run.json", "images.json"))
    assert (run["options"]["nms"], images["info"]["nms"]) == (0.05, 0.05)


def test_what_tiles_found_twice_is_left_out_too(model: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    counts = []
    for number, options in enumerate(([], ["--tiles", 64], ["--tiles", 64, "--nms", 0.05])):
        output = tmp_path / f"{number}"
        assert detect(model, tmp_path / "a.png", "-o", output, "-t", 0, "-q", "--format", "coco", *options) == 0
        counts.append(len(detections_in(output)))
    assert counts[0] == 100
    assert 0 < counts[2] < counts[1]


@pytest.mark.parametrize("options", [["--classes", "cat,cst"], ["--threshold", "Cst=0.3"]])
def test_an_unknown_class_exits_2_with_the_closest_names_and_leaves_nothing(
    options: list[str], model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(model, photos, "-o", tmp_path / "out", "-q", *options) == 2
    assert "unknown (the model has no such class). Did you mean cat" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_same_option_twice_means_the_last_one(model: str, photos: Path, tmp_path: Path) -> None:
    assert detect(model, photos, "-o", tmp_path / "x", "-q", "-t", "1", "-t", "0", "-o", tmp_path / "y") == 0
    assert len(detections_in(tmp_path / "y")) == 300
    assert not (tmp_path / "x").exists()


def test_names_that_start_with_a_dash_can_be_given_after_two_dashes(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "a.jpg").rename(tmp_path / "-a.jpg")
    monkeypatch.chdir(tmp_path)
    assert detect(model, "-q", "-o", "out", "--", "-a.jpg") == 0
    assert files_in(tmp_path / "out/annotated") == ["-a.jpg"]


def test_two_sources_whose_outputs_meet_are_refused_before_work(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.jpg").write_bytes((photos / "a.jpg").read_bytes())
    assert detect("no-such-model.pth", photos, tmp_path / "other", "-o", tmp_path / "out") == 2
    assert "also that of" in capsys.readouterr().err
    assert detect(model, photos, tmp_path / "other", "-o", tmp_path / "out", "-q") == 2


def test_verbose_tells_of_kernels_tensors_and_every_image(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(photos / "d.gif", save_all=True, append_images=frames[1:])
    assert detect(model, photos, "-o", tmp_path / "out", "-t", 0, "-v") == 0
    err = capsys.readouterr().err
    assert "kernels: cpu " in err
    assert "missing     0" in err
    assert f"{photos / 'a.jpg'}: 64x48, " in err
    assert f"{photos / 'd.gif'}: several frames or pages; only the first is used" in err


def test_class_names_cannot_act_on_the_terminal_and_unnamed_classes_are_shown_by_id(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(model, photos, "-o", tmp_path / "out", "-t", 0) == 0
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "dog\\x1b[31m" in err
    assert "class 7" in err


def test_quiet_says_nothing_when_all_is_well_and_names_what_is_not(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect(model, photos, "-o", tmp_path / "a", "-q") == 0
    assert "processed" not in capsys.readouterr().err
    (photos / "bad.jpg").write_bytes(b"")
    assert detect(model, photos, "-o", tmp_path / "b", "-q") == 3
    assert capsys.readouterr().err.splitlines() == [
        f"ddetr: error: {photos / 'bad.jpg'}: not an image (the file is empty). Copy or download it again.",
        "processed 3, failed 1, skipped 0",
    ]


def test_detections_that_are_not_finite_are_counted_and_exit_3(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddetr_cli.model.postprocess import Detections, decode

    def spoil(*arguments: Any) -> list[Detections]:
        rows = decode(*arguments)
        rows[0].boxes_xyxy_px[0, 0] = float("nan")
        return rows

    monkeypatch.setattr("ddetr_cli.inference.predictor.decode", spoil)
    assert detect(model, photos, "-o", tmp_path / "out", "-t", 0, "-q") == 3
    assert "a.jpg: 1 detections dropped (not finite numbers)" in capsys.readouterr().err
    assert len(detections_in(tmp_path / "out")) == 297


def test_the_annotated_picture_and_the_sizes_are_upright(model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    upright = Image.fromarray(values)
    upright.save(tmp_path / "in/1.png")
    exif = Image.Exif()
    exif[274] = 6  # stored a quarter turn to the left of upright
    exif[34853] = {1: "N"}  # a GPS block
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in/6.png", exif=exif)
    assert detect(model, tmp_path / "in", "-o", tmp_path / "out", "-t", 0, "-q") == 0
    assert [(image["width"], image["height"]) for image in images_in(tmp_path / "out")] == [(64, 48)] * 2
    rows = detections_in(tmp_path / "out")
    assert [row["bbox"] for row in rows[:100]] == [row["bbox"] for row in rows[100:]]
    with Image.open(tmp_path / "out/annotated/6.png") as drawn:
        assert drawn.size == (64, 48)
        assert len(drawn.getexif()) == 0


def test_a_cuda_device_that_is_not_there_exits_8(model: str, photos: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert main(["detect", str(photos), "-m", model, "-o", str(tmp_path / "out"), "--device", "cuda:0"]) == 8
    assert not (tmp_path / "out").exists()


def test_preprocess_hf_takes_the_size_of_transformers_and_is_on_record(model: str, tmp_path: Path) -> None:
    # At short side 64 the cap is 106: 64 * 231 / 640 px would be 23.1, so it binds and the rules differ.
    values = np.random.default_rng(0).integers(0, 256, (231, 640, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "long.png")
    assert [network_size(640, 231, 64), network_size(640, 231, 64, rule="hf")] == [(38, 105), (38, 106)]
    for rule in ("original", "hf"):
        output = tmp_path / rule
        assert detect(model, tmp_path / "long.png", "-o", output, "-t", 0, "-q", "--preprocess", rule) == 0
        assert json.loads((output / "images.json").read_text())["info"]["preprocess"] == rule
    assert detections_in(tmp_path / "original") != detections_in(tmp_path / "hf")


def test_in_16_bits_large_jpegs_are_decoded_reduced_whatever_is_written_unless_asked_not_to(
    model: str, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg")
    common = [tmp_path / "large.jpg", "-t", 0, "-q"]
    for name, options in (
        ("boxes", ["--format", "coco", "--precision", "bf16"]),
        ("pictures", ["--format", "coco,images", "--precision", "bf16"]),
        ("whole", ["--format", "coco", "--precision", "bf16", "--no-draft"]),
        ("fp32", ["--format", "coco", "--precision", "fp32"]),
    ):
        assert detect(model, *common, "-o", tmp_path / name, *options) == 0
        info = json.loads((tmp_path / name / "images.json").read_text())["info"]
        assert info["draft"] is (name in ("boxes", "pictures"))
    assert detections_in(tmp_path / "boxes") == detections_in(tmp_path / "pictures")
    assert detections_in(tmp_path / "boxes") != detections_in(tmp_path / "whole")
    with Image.open(tmp_path / "pictures" / "annotated" / "large.jpg") as annotated:
        assert annotated.size == (640, 480)


def test_draft_is_refused_where_every_pixel_is_needed(model: str, photos: Path, tmp_path: Path) -> None:
    assert detect(model, photos, "-o", tmp_path / "out", "-q", "--draft", "--tiles", 64) == 2
    assert not (tmp_path / "out").exists()


def test_draft_changes_nothing_for_pictures_that_are_small_or_no_jpegs(
    model: str, photos: Path, tmp_path: Path
) -> None:
    for name in ("draft", "no-draft"):
        assert detect(model, photos, "-o", tmp_path / name, "-t", 0, "-q", "--format", "coco", f"--{name}") == 0
    assert detections_in(tmp_path / "draft") == detections_in(tmp_path / "no-draft")


def test_tiles_find_more_in_large_pictures_are_on_record_and_change_nothing_for_small_ones(
    model: str, photos: Path, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(values).save(photos / "large.png")
    assert detect(model, photos, "-o", tmp_path / "plain", "-t", 0, "-q") == 0
    for batch_size in (1, 8):
        output = tmp_path / f"{batch_size}"
        assert detect(model, photos, "-o", output, "-t", 0, "-q", "--tiles", 80, "-b", batch_size) == 0
    plain, tiled = detections_in(tmp_path / "plain"), detections_in(tmp_path / "1")
    (number,) = (image["id"] for image in images_in(tmp_path / "1") if image["file_name"] == "large.png")
    assert [row for row in tiled if row["image_id"] != number] == [row for row in plain if row["image_id"] != number]
    assert len([row for row in tiled if row["image_id"] == number]) > 200
    assert (tmp_path / "1/detections.json").read_bytes() == (tmp_path / "8/detections.json").read_bytes()
    assert json.loads((tmp_path / "1/images.json").read_text())["info"]["tiles"] == [80, 0.25]
    assert json.loads((tmp_path / "plain/images.json").read_text())["info"]["tiles"] is None
