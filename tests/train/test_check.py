from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddetr_cli.train import check
from ddetr_cli.train.check import DataReport, check_data
from ddetr_cli.train.options import TrainOptions


def inspect(options: TrainOptions) -> DataReport:
    return check_data(options, begin=lambda count: None, advance=lambda: None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One picture of 640x480 and one of 320x320 with boxes of every size; the second is background in val."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    sizes = {"wide": (640, 480), "square": (320, 320), "dark": (320, 320)}
    for shade, (name, size) in enumerate(sizes.items()):
        Image.new("RGB", size, (40 * shade, 0, 0)).save(root / f"images/{name}.png")
    boxes = [("wide", 1, 20, 20), ("wide", 1, 40, 40), ("wide", 2, 200, 100), ("square", 1, 15, 15)]
    for split, names in (("train", ("wide", "square")), ("val", ("dark", "wide"))):
        content = {
            "images": [
                {"id": n, "file_name": f"{n}.png", "width": sizes[n][0], "height": sizes[n][1]} for n in names
            ],
            "annotations": [
                {"id": i, "image_id": n, "category_id": c, "bbox": [9, 9, w, h], "area": w * h, "iscrowd": 0}
                for i, (n, c, w, h) in enumerate(boxes, start=1)
                if n in names
            ],
            "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "egg"}, {"id": 3, "name": "cell"}],
        }
        (root / f"annotations/{split}.json").write_text(json.dumps(content))
    return root


def test_facts_are_counted_without_crowds_and_at_the_networks_size(data: Path) -> None:
    report = inspect(TrainOptions(Path("run"), data=data, preset="tiny"))
    facts = report.train
    assert facts is not None
    assert (facts.images, facts.images_without_boxes, facts.boxes, facts.crowd_regions) == (2, 0, 4, 0)
    assert (facts.small, facts.medium, facts.large) == (2, 1, 1)
    # Short side 320: the wide picture shrinks by 480/320, so that 20x20 becomes 13x13; 15x15 stays.
    assert facts.few_pixels == 2
    assert (facts.boxes_per_image_median, facts.boxes_per_image_most) == (2, 3)
    assert (facts.aspect_least, facts.aspect_most) == (1, pytest.approx(4 / 3))
    assert facts.boxes_per_class == {"cell (id 1)": 3, "egg": 1, "cell (id 3)": 0}
    assert report.val is not None and report.val.images_without_boxes == 1


def test_findings_say_which_split_they_are_of(data: Path) -> None:
    report = inspect(TrainOptions(Path("run"), data=data, preset="tiny", queries=2))
    found = {(part, finding.what.split(":")[0].split(",")[0], finding.examples) for part, finding in report.findings}
    assert found == {
        ("train", "name belongs to several categories", ("'cell'",)),
        ("val", "name belongs to several categories", ("'cell'",)),
        ("train", "have no object to learn them from", ("cell",)),
        ("train", "have more objects than the 2 queries of the model", ("wide.png: 3",)),
        ("train and val", "of val are trained on too", ("wide.png",)),
    }
    assert report.refused == 0


def test_the_report_is_plain_json(data: Path) -> None:
    report = inspect(TrainOptions(Path("run"), data=data, preset="tiny"))
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["trainable"] is True
    assert content["train"]["boxes"] == 4
    assert {finding["split"] for finding in content["findings"]} == {"train", "val", "train and val"}


def test_every_reason_is_there_though_the_first_would_do(data: Path) -> None:
    (data / "annotations/val.json").write_text("[")
    (data / "images/square.png").unlink()
    report = inspect(TrainOptions(Path("run"), data=data, preset="tiny"))
    refused = [(part, finding.what) for part, finding in report.findings if finding.outcome == "refused"]
    assert [part for part, _ in refused] == ["train", "val"]
    assert refused[0][1] == "picture file is missing"
    assert "line 1, column 2: not JSON" in refused[1][1]
    assert report.val is None and report.refused == 2


def test_of_many_pixels_only_every_nth_picture_is_decoded(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "DECODED_PIXELS", 300_000)
    report = inspect(TrainOptions(Path("run"), data=data, preset="tiny"))
    assert report.train is not None and report.train.decoded_every == 2


def test_one_file_alone_is_split_alike_every_time(
    tmp_path: Path, write_split: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split(tmp_path, "train", 20, seed=3)
    (tmp_path / "annotations/train.json").rename(tmp_path / "boxes.json")
    (tmp_path / "annotations").rmdir()
    reports = [inspect(TrainOptions(Path("run"), data=tmp_path, preset="tiny")) for _ in range(2)]
    assert reports[0] == reports[1]
    train, val = reports[0].train, reports[0].val
    assert train is not None and val is not None
    assert (train.images, val.images) == (18, 2)
    assert train.annotations == val.annotations == str(tmp_path / "boxes.json")


def test_pictures_are_announced_and_counted(data: Path) -> None:
    begun: list[int] = []
    done: list[Any] = []
    check_data(TrainOptions(Path("run"), data=data), begin=begun.append, advance=lambda: done.append(1))
    assert (begun, len(done)) == ([2, 2], 4)
