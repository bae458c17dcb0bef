from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ddetr_cli.cli.app import main


def yolo(root: Path) -> Path:
    for split in ("train", "val"):
        (root / split / "images").mkdir(parents=True)
        (root / split / "labels").mkdir()
        for n, shade in ((1, 60), (2, 120)):
            Image.new("RGB", (64, 48), (shade, 0, len(split))).save(root / split / f"images/{n}.png")
            (root / split / f"labels/{n}.txt").write_text(f"{n - 1} 0.5 0.5 0.25 0.5\n")
    (root / "data.yaml").write_text("train: train/images\nval: val/images\nnames: {0: cat, 1: dog}\n")
    return root


def voc(root: Path) -> Path:
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for n, name in ((1, "cat"), (2, "dog")):
            Image.new("RGB", (64, 48), (60 * n, 0, len(split))).save(root / split / f"{n}.png")
            (root / split / f"{n}.xml").write_text(
                "<annotation><size><width>64</width><height>48</height></size><object>"
                f"<name>{name}</name><bndbox><xmin>25</xmin><ymin>13</ymin><xmax>40</xmax><ymax>36</ymax></bndbox>"
                "</object></annotation>"
            )
    return root


@pytest.mark.parametrize("build", [yolo, voc])
def test_folders_of_yolo_and_voc_are_checked_and_scored_like_those_of_coco(
    build: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = build(tmp_path / "data")
    assert main(["train", str(root), "--check", "--preset", "tiny"]) == 0
    text = capsys.readouterr().out
    assert "nothing to repair, nothing to note" in text
    assert re.search(r"^boxes +2 +2$", text, flags=re.MULTILINE)
    suffix, first = (".png", 0) if build is yolo else ("", 1)
    rows = [
        {"image_id": f"{n}{suffix}", "category_id": n - 1 + first, "bbox": [24, 12, 16, 24], "score": 0.9}
        for n in (1, 2)
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert main(["eval", str(root), "--predictions", str(tmp_path / "results.json"), "--output", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text())["AP"] == pytest.approx(1)


def test_the_report_is_written_as_json_on_request(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    (root / "train/labels/1.txt").write_text("0 0.5 0.5 0.25\n")
    file = tmp_path / "check.json"
    assert main(["train", str(root), "--check", "--preset", "tiny", "--json", str(file)]) == 6
    content = json.loads(file.read_text())
    assert (content["trainable"], content["queries"], content["val"]["boxes"]) == (False, 100, 2)
    (refused,) = [finding for finding in content["findings"] if finding["outcome"] == "refused"]
    assert refused["examples"] == ["annotation id '1.txt:1': [0.5, 0.5, 0.25]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "cells", "--json", "x.json"], "--json: of use with --check only"),
        (["train", "--check", "--resume", "run"], "--check: of no use with --resume"),
        (["train", "nowhere", "--check"], "not an existing folder"),
    ],
)
def test_options_that_mean_nothing_together_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_of_many_classes_the_most_and_the_least_frequent_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = yolo(tmp_path / "data")
    names = ", ".join(f"{n}: kind{n}" for n in range(100))
    (root / "data.yaml").write_text(f"train: train/images\nval: val/images\nnames: {{{names}}}\n")
    assert main(["train", str(root), "--check", "--preset", "tiny"]) == 0
    text = capsys.readouterr().out
    assert "... 76 more" in text
    assert re.findall(r"^kind(\d+) ", text, flags=re.MULTILINE) == [str(n) for n in (*range(12), *range(88, 100))]


def test_a_terminal_gets_colours_and_hanging_sentences(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    (root / "train/images/2.png").write_bytes(b"")
    leader, follower = pty.openpty()
    code = "import sys; from ddetr_cli.cli.app import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["train", str(root), "--check", "--preset", "tiny"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=follower, stderr=subprocess.DEVNULL, env=environment
    )
    os.close(follower)
    text = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert done.returncode == 6
    assert "\x1b[1;31mrefused" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r", "")
    assert "\n  train: 1 of 2 images: cannot be read (2.png: " in plain
    assert "\n         " in plain
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= 80
