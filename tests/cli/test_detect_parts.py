"""A run of ``ddetr detect`` in shards or in several processes gives the bytes of one that was whole."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.cli.app import main

RUN = "import sys; from ddetr_cli.cli.app import main; sys.exit(main())"
FORMATS = "coco,jsonl,csv,yolo,images,crops,sheet"


def detect(model: str, *arguments: object) -> int:
    return main(["detect", "--model", model, "--device", "cpu", "-t", "0.2", *map(str, arguments)])


def results_in(output: Path) -> dict[str, bytes]:
    """Every file of a run but run.json, which tells times."""
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


@pytest.fixture
def dozen(tmp_path: Path) -> Path:
    """Twelve pictures in two folders, one of them broken, one named as COCO names its own."""
    for number in range(12):
        path = tmp_path / "in" / ("b" if number % 3 else "a") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (40 + number, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(path)
    (tmp_path / "in/b/4.png").write_bytes(b"no picture")
    (tmp_path / "in/a/0.png").rename(tmp_path / "in/a/000000000003.png")
    return tmp_path / "in"


def test_seven_shards_merged_in_any_order_are_the_single_run_byte_for_byte(
    model: str, dozen: Path, tmp_path: Path
) -> None:
    options = ("-q", "--format", FORMATS, "--nms", "0.05")
    assert detect(model, dozen, "-o", tmp_path / "whole", *options) == 3
    codes = [detect(model, dozen, "-o", tmp_path / f"{n}", *options, "--shard", f"{n}/7") for n in range(1, 8)]
    assert sorted(codes) == [0] * 6 + [3]
    shards = [tmp_path / f"{n}" for n in (3, 1, 7, 2, 5, 4, 6)]
    assert main(["detect", "--merge", *map(str, shards), "-o", str(tmp_path / "merged"), "-q"]) == 3
    assert results_in(tmp_path / "merged") == results_in(tmp_path / "whole")
    assert json.loads((tmp_path / "merged/run.json").read_text())["counts"]["processed"] == 11


@pytest.fixture(params=["tar", "url", "video"])
def elsewhere(request: pytest.FixtureRequest, dozen: Path, tmp_path: Path) -> str:
    """A source whose pictures are no files of their own."""
    if request.param == "tar":
        subprocess.run(["tar", "-cf", tmp_path / "in.tar", "-C", dozen, "."], check=True)
        return str(tmp_path / "in.tar")
    if request.param == "url":
        fsspec = pytest.importorskip("fsspec")
        for path in dozen.rglob("*.png"):
            fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{path.name}", path.read_bytes())
        return f"memory://{tmp_path.name}/"
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for number in range(12):
            values = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode(None))
    return str(tmp_path / "clip.mkv")


def test_the_sheet_of_merged_shards_shows_pictures_that_are_no_files_too(
    model: str, elsewhere: str, tmp_path: Path
) -> None:
    options = ("-q", "--format", "sheet")
    detect(model, elsewhere, "-o", tmp_path / "whole", *options)
    for n in (1, 2):
        detect(model, elsewhere, "-o", tmp_path / f"{n}", *options, "--shard", f"{n}/2")
    main(["detect", "--merge", str(tmp_path / "1"), str(tmp_path / "2"), "-o", str(tmp_path / "merged"), "-q"])
    assert results_in(tmp_path / "merged") == results_in(tmp_path / "whole")
    with Image.open(tmp_path / "merged/sheet.jpg") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    is_coloured = pixels.max(axis=2) - pixels.min(axis=2) > 60
    assert is_coloured.sum() > 5000  # of noise; a field without its picture is grey


def test_what_is_not_all_of_one_run_is_not_merged(
    model: str, dozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in (1, 2):
        detect(model, dozen, "-o", tmp_path / f"{n}", "-q", "--format", "coco", "--shard", f"{n}/2")
    detect(model, dozen, "-o", tmp_path / "third", "-q", "--format", "coco", "--shard", "1/3")
    detect(model, dozen, "-o", tmp_path / "other", "-q", "--format", "jsonl", "--shard", "2/2")
    shutil.copytree(tmp_path / "2", tmp_path / "broken")
    lines = (tmp_path / "2/journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "broken/journal.jsonl").write_bytes(b"".join(lines[:-2]))
    cases = {
        ("1",): "shard 2/2 is missing",
        ("1", "1"): "",
        ("1", "third"): "is shard 1/2, ",
        ("1", "other"): "is of another run than",
        ("1", "broken"): "is not finished (2 of 6 images are missing)",
        ("1", "nowhere"): "no run of ddetr detect",
    }
    for names, said in cases.items():
        capsys.readouterr()
        code = main(["detect", "--merge", *(str(tmp_path / name) for name in names), "-o", str(tmp_path / "m")])
        err = capsys.readouterr().err
        assert said in err
        assert code == 2
        assert not (tmp_path / "m").exists()
    assert main(["detect", "--merge", str(tmp_path / "1"), str(tmp_path / "2"), "-o", str(tmp_path / "1")]) == 7


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", ""])
def test_a_part_that_is_none_exits_2(model: str, dozen: Path, tmp_path: Path, shard: str) -> None:
    assert detect(model, dozen, "-o", tmp_path / "out", f"--shard={shard}") == 2


def test_a_shard_without_pictures_is_no_failure(model: str, photos: Path, tmp_path: Path) -> None:
    for n in range(1, 5):
        assert detect(model, photos, "-o", tmp_path / f"{n}", "-q", "--format", "coco", "--shard", f"{n}/4") == 0


def torchrun(processes: int, model: str, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """``ddetr detect`` in so many processes, each in the environment that torchrun gives it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", RUN, "detect", "-m", model, "--device", "cpu", "-t", "0.2", *map(str, arguments)]
    started = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    return [
        subprocess.CompletedProcess(command, process.returncode, out, err)
        for process, (out, err) in zip(started, outputs, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one_and_go_on_with_what_one_began(
    model: str, dozen: Path, tmp_path: Path
) -> None:
    assert detect(model, dozen, "-o", tmp_path / "whole", "-q", "--format", FORMATS) == 3
    output = tmp_path / "out"
    done = torchrun(2, model, dozen, "-o", output, "--format", FORMATS)
    assert [one.returncode for one in done] == [3, 0], done[0].stderr + done[1].stderr
    assert "processed 11, failed 1, skipped 0" in done[0].stderr
    assert "model:" not in done[1].stderr
    assert results_in(output) == results_in(tmp_path / "whole")
    # As if one process had been killed early, and then as if two had.
    lines = (output / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (output / "journal.jsonl").write_bytes(b"".join(lines[:4]))
    (output / "detections.json").unlink()
    done = torchrun(2, model, dozen, "-o", output, "--format", FORMATS, "--resume")
    assert [one.returncode for one in done] == [3, 0], done[0].stderr + done[1].stderr
    assert results_in(output) == results_in(tmp_path / "whole")
    (output / "journal.jsonl").write_bytes(b"".join(lines[:4]))
    (output / "journal-2-of-2.jsonl").write_bytes(b"".join([lines[0], *lines[8:10]]))
    assert detect(model, dozen, "-o", output, "-q", "--format", FORMATS, "--resume") == 3
    assert (output / "detections.json").read_bytes() == (tmp_path / "whole/detections.json").read_bytes()


@pytest.mark.slow
def test_an_output_that_is_refused_ends_every_process(model: str, dozen: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = torchrun(2, model, dozen, "-o", tmp_path / "out")
    assert done[0].returncode == 7
    assert "exists already" in done[0].stderr
    assert done[1].returncode != 0
    assert "Traceback" not in done[1].stderr
