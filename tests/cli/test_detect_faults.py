"""What must not break ``ddetr detect``: hostile files, full disks, signals, kills, a whole fuzzer's corpus."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ddetr_cli.cli.app import main

RUN = "import sys; from ddetr_cli.cli.app import main; sys.exit(main())"


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


def many_photos(folder: Path, count: int) -> None:
    folder.mkdir()
    Image.new("RGB", (64, 48), "grey").save(folder / "0000.jpg")
    for number in range(1, count):
        os.link(folder / "0000.jpg", folder / f"{number:04d}.jpg")


def test_pipes_sockets_and_dangling_links_fail_at_once_and_the_rest_is_done(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(photos / "pipe.jpg")
    (photos / "gone.jpg").symlink_to("nowhere")
    (photos / "self").symlink_to(".")
    assert detect(model, photos, "-o", tmp_path / "out") == 3
    err = capsys.readouterr().err
    assert f"{photos / 'pipe.jpg'}: not a regular file" in err
    assert f"{photos / 'gone.jpg'}: link to a missing file" in err
    assert "processed 3, failed 2, skipped 1" in err


def test_hostile_file_names_are_processed_shown_escaped_and_come_back_from_the_json(
    model: str, tmp_path: Path
) -> None:
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    names = [
        b"bad\xff.jpg",
        b"new\nline.jpg",
        b"\x1b[31mred.jpg",
        "😀.jpg".encode(),
        "\u202egpj.jpg".encode(),
        b"n" * 251 + b".jpg",
    ]
    for name in names:
        with open(folder + b"/" + name, "wb") as file:
            Image.new("RGB", (32, 32)).save(file, "JPEG")
    environment = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONWARNINGS": "error"}
    command = [
        sys.executable,
        "-c",
        RUN,
        "detect",
        str(tmp_path / "in"),
        "-m",
        model,
        "-o",
        str(tmp_path / "out"),
        "-v",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert "bad\\xff.jpg" in done.stderr
    assert "new\\nline.jpg" in done.stderr
    assert "\x1b" not in done.stderr
    assert "\u202e" not in done.stderr
    assert sorted(os.fsencode(str(image["file_name"])) for image in images_in(tmp_path / "out")) == sorted(names)
    assert sorted(os.listdir(os.fsencode(tmp_path / "out/annotated"))) == sorted(names)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_finishes_the_image_saves_what_is_done_and_names_the_rest(
    model: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    many_photos(tmp_path / "in", 2000)
    output = tmp_path / "out"
    command = [sys.executable, "-c", RUN, "detect", str(tmp_path / "in"), "-m", model, "-o", str(output), "-t", "0"]
    # Not as inherited: a shell has its background jobs ignore SIGINT.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)
    )
    try:
        deadline = time.monotonic() + 240  # importing torch on a loaded machine
        while not (output / "annotated").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code
    images = images_in(output)
    done = [image["id"] for image in images if "failed" not in image]
    assert len(images) == 2000
    assert 0 < len(done) < 2000
    assert {image["failed"] for image in images if "failed" in image} == {"not processed (the run was stopped)."}
    assert sorted({row["image_id"] for row in detections_in(output)}) == done  # type: ignore[type-var]
    assert len(files_in(output / "annotated")) == len(done)
    assert f"not reached {2000 - len(done)}" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_reader_of_stderr_that_leaves_does_not_stop_the_run(model: str, photos: Path, tmp_path: Path) -> None:
    script = f'"$0" -c "{RUN}" detect "$1" -m "$2" -o "$3" -v 2>&1 >/dev/null | head -n 1; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, str(photos), model, str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert len(files_in(tmp_path / "out")) == 7


def test_a_disk_that_is_full_exits_7_without_half_files_and_a_second_run_finishes(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Stands for a full disk: no file may grow beyond this.
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        code = detect(model, photos, "-o", output, "-t", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 7
    assert "not written (File too large)" in capsys.readouterr().err
    assert not (output / "detections.json").exists()
    assert not (output / "images.json").exists()
    for name in files_in(output / "annotated"):
        with Image.open(output / "annotated" / name) as whole:
            whole.load()
    assert not [name for name in files_in(output) if name.endswith(".tmp")]
    assert detect(model, photos, "-o", output, "-t", "0", "--resume", "-q") == 0
    assert len(files_in(output)) == 7


def test_an_all_black_picture_is_a_result_and_text_that_inflates_without_end_a_failure(
    model: str, tmp_path: Path
) -> None:
    from PIL.PngImagePlugin import PngInfo

    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "in/black.png")
    text = PngInfo()
    text.add_text("comment", "a" * 80_000_000, zip=True)
    Image.new("RGB", (64, 48)).save(tmp_path / "in/bomb.png", pnginfo=text)
    assert (tmp_path / "in/bomb.png").stat().st_size < 200_000
    assert detect(model, tmp_path / "in", "-o", tmp_path / "out", "--format", "coco", "-t", "0") == 3
    black, bomb = images_in(tmp_path / "out")
    assert (black["width"], black["height"], "failed" in black) == (64, 48, False)
    assert str(bomb["failed"]).startswith("damaged image (Decompressed data too large")


def account(folder: Path, output: Path, err: str) -> list[dict[str, object]]:
    """Check that every file below ``folder`` is processed, failed or skipped, and drawn where it was processed."""
    images = images_in(output)
    failed = [image for image in images if "failed" in image]
    drawn = files_in(output / "annotated")
    skipped = len(files_in(folder)) - len(images)
    assert f"processed {len(images) - len(failed)}, failed {len(failed)}, skipped {skipped}" in err
    assert len(drawn) == len(images) - len(failed)
    for image in failed:
        assert f"{folder / str(image['file_name'])}: {image['failed']}" in err
    return images


def test_real_photos_are_all_accounted_for_and_turned_upright(
    model: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data_dir / "photos" / "images"
    assert detect(model, folder, "-o", tmp_path / "out", "-t", "0") == 3
    images = account(folder, tmp_path / "out", capsys.readouterr().err)
    assert [image["file_name"] for image in images if "failed" in image] == ["nokia_hdr.heif"]
    turned = [image for image in images if str(image["file_name"]).startswith("exif_landscape")]
    assert [(image["width"], image["height"]) for image in turned] == [(1800, 1200)] * 9
    assert 39769 in [image["id"] for image in images]
    for image in images:
        if "failed" not in image:
            name = str(image["file_name"])
            with Image.open(tmp_path / "out/annotated" / name) as drawn:
                assert drawn.size == (image["width"], image["height"])
                assert len(drawn.getexif()) == 0


def test_the_fuzzers_corpus_is_all_accounted_for_in_one_run(
    model: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data_dir / "bad_images"
    expected = json.loads((folder / "expected.json").read_text())["files"]
    accepted = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "AVIF"}
    assert detect(model, folder, "-o", tmp_path / "out", "--max-pixels", "178956970") == 3
    images = account(folder, tmp_path / "out", capsys.readouterr().err)
    wrong = []
    for image in images:
        known = expected.get(str(image["file_name"]))
        if known is None:
            continue
        if known["result"] == "ok" and known.get("format") in accepted and "failed" in image:
            wrong.append((image["file_name"], image["failed"]))
        if known.get("format") not in accepted and "failed" not in image:
            wrong.append((image["file_name"], "processed"))
    assert wrong == []


@pytest.mark.slow
def test_the_fuzzers_corpus_takes_less_than_2_gib_and_leaves_stdout_clean(
    model: str, data_dir: Path, tmp_path: Path
) -> None:
    folder = data_dir / "bad_images"
    # Its own peak: what wait4 tells of a child counts the memory of the process that started it as well.
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ddetr_cli.cli.app import main\n"
        "code = main()\n"
        "Path('peak').write_text(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "detect", str(folder), "-m", model, "--device", "cpu"]
    command += ["--format", "jsonl", "-o", "-", "-q"]
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        environment = {**os.environ, "HOME": "/nonexistent"}
        process = subprocess.run(command, stdout=out, stderr=err, cwd=tmp_path, env=environment)
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    names = {name for name in files_in(folder) if any(line["file_name"] == name for line in lines)}
    assert process.returncode == 3
    assert len(lines) == len(names) > 200
    assert all(line["failed"] for line in lines if "failed" in line)
    assert int((tmp_path / "peak").read_text()) < 2 * 1024 * 1024  # KiB
    assert "Traceback" not in (tmp_path / "err").read_text(errors="replace")


@pytest.mark.slow
def test_a_run_killed_at_any_moment_leaves_only_whole_files_and_can_be_run_again(model: str, tmp_path: Path) -> None:
    many_photos(tmp_path / "in", 300)
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        RUN,
        "detect",
        str(tmp_path / "in"),
        "-m",
        model,
        "-o",
        str(output),
        "--overwrite",
    ]
    for extra in (0.0, 0.11, 0.23, 0.37, 0.53):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 240  # importing torch on a loaded machine
            count = len(files_in(output))
            while len(files_in(output)) <= count and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(extra)
        finally:
            process.kill()
            process.wait()
        for name in ("detections.json", "images.json"):
            if (output / name).exists():
                json.loads((output / name).read_text())
        for path in (output / "annotated").glob("*.jpg"):
            with Image.open(path) as whole:
                whole.load()
    assert detect(model, tmp_path / "in", "-o", output, "--overwrite", "-q") == 0
    assert len(files_in(output)) == 304  # and no temporary file of the killed runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"), [("size=24k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_small_disk_and_a_read_only_one_exit_7(
    model: str, photos: Path, tmp_path: Path, options: str, reason: str
) -> None:
    script = (
        'mount -t tmpfs -o "$4" tmpfs "$3" || exit 99; '
        f'"$0" -c "{RUN}" detect "$1" -m "$2" -o "$3/out" -t 0; code=$?; find "$3" -type f; exit $code'
    )
    (tmp_path / "disk").mkdir()
    arguments = [sys.executable, str(photos), model, str(tmp_path / "disk"), options]
    try:
        done = subprocess.run(["unshare", "-m", "bash", "-c", script, *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare on this system")
    if done.returncode in (1, 99):
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert (done.returncode, reason in done.stderr) == (7, True)
    assert "detections.json" not in done.stdout
    assert ".tmp" not in done.stdout
