"""Every kind of source of ``ddetr detect``, fed by another tool than ours, gives what the plain files give."""

from __future__ import annotations

import functools
import http.server
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.cli.app import main

if TYPE_CHECKING:
    from collections.abc import Iterator


def detect(model: str, output: Path, *arguments: object) -> int:
    options = ["--model", model, "--device", "cpu", "-t", "0.2", "-q", "--format", "coco"]
    return main(["detect", *options, "-o", str(output), *map(str, arguments)])


def found_in(output: Path) -> dict[str, list[Any]]:
    """What was found by file name; the reason where a file failed."""
    images = json.loads((output / "images.json").read_text())["images"]
    rows = json.loads((output / "detections.json").read_text())
    return {
        image["file_name"]: [image["failed"]]
        if "failed" in image
        else [[row["category_id"], row["bbox"], row["score"]] for row in rows if row["image_id"] == image["id"]]
        for image in images
    }


@pytest.fixture
def plain(model: str, photos: Path, tmp_path: Path) -> dict[str, list[Any]]:
    """What is found in the plain files of ``photos``."""
    assert detect(model, tmp_path / "plain", photos) == 0
    found = found_in(tmp_path / "plain")
    assert all(found.values())
    return found


def test_a_pattern_names_pictures_from_its_first_wildcard_on(
    model: str, photos: Path, tmp_path: Path, plain: dict[str, list[Any]]
) -> None:
    assert detect(model, tmp_path / "out", photos / "**" / "*.[jp]*g") == 0
    assert found_in(tmp_path / "out") == {name: plain[name] for name in ("a.jpg", "sub/b.png")}


def test_a_pattern_that_matches_nothing_exits_2(model: str, photos: Path, tmp_path: Path) -> None:
    assert detect(model, tmp_path / "out", photos / "*.webp") == 2


def test_folders_within_folders_are_searched_unless_asked_not_to(
    model: str, photos: Path, tmp_path: Path, plain: dict[str, list[Any]]
) -> None:
    assert detect(model, tmp_path / "out", photos, "--no-recursive") == 0
    assert found_in(tmp_path / "out") == {"a.jpg": plain["a.jpg"]}


def test_a_list_names_pictures_as_they_stand_in_it_and_a_missing_one_fails_alone(
    model: str, photos: Path, tmp_path: Path, plain: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    (tmp_path / "list.txt").write_text("sub/c.tif\r\n\n./a.jpg\nnowhere.jpg\n")
    assert detect(model, tmp_path / "out", "--list", tmp_path / "list.txt") == 3
    assert found_in(tmp_path / "out") == {
        "a.jpg": plain["a.jpg"],
        "nowhere.jpg": ["no such file. Check the path."],
        "sub/c.tif": plain["sub/c.tif"],
    }


@pytest.mark.parametrize(("print_option", "options"), [("-print", []), ("-print0", ["-0"])])
def test_find_feeds_stdin(
    model: str,
    photos: Path,
    tmp_path: Path,
    plain: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    print_option: str,
    options: list[str],
) -> None:
    if print_option == "-print0":
        shutil.copy(photos / "a.jpg", photos / "two\nlines.jpg")
        plain = {**plain, "two\nlines.jpg": plain["a.jpg"]}
    listed = subprocess.run(["find", ".", "-type", "f", print_option], cwd=photos, capture_output=True, check=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.stdout)))
    monkeypatch.chdir(photos)
    assert detect(model, tmp_path / "out", "-", *options) == 0
    assert found_in(tmp_path / "out") == plain


def test_lists_that_cannot_mean_anything_exit_2(model: str, photos: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--null", photos], ["--list", tmp_path / "nowhere"], ["-", "--list", "-"]):
        assert detect(model, tmp_path / "out", *arguments) == 2


def test_tar_archives_are_read_where_they_lie(
    model: str, photos: Path, tmp_path: Path, plain: dict[str, list[Any]]
) -> None:
    (photos / "a.json").write_text("{}")  # WebDataset keeps the label beside the picture
    archive = tmp_path / "shard-000.tar"
    subprocess.run(["tar", "-cf", archive, "-C", photos, "."], check=True)
    assert detect(model, tmp_path / "out", archive) == 0
    assert found_in(tmp_path / "out") == {f"shard-000.tar/{name}": rows for name, rows in plain.items()}
    assert detect(model, tmp_path / "both", archive, "--format", "images") == 0
    assert (tmp_path / "both/annotated/shard-000.tar/sub/b.png").exists()


def test_an_archive_that_is_damaged_compressed_or_leads_out_of_its_folder_fails_by_name(
    model: str, photos: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.add(photos / "a.jpg", "../../evil.jpg")
        tar.add(photos / "a.jpg", "good.jpg")
    whole = (tmp_path / "evil.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 20 * 7])
    (tmp_path / "none.tar").write_bytes(b"no archive at all")
    subprocess.run(["tar", "-czf", tmp_path / "packed.tar.gz", "-C", photos, "."], check=True)
    names = ("evil.tar", "cut.tar", "none.tar", "packed.tar.gz")
    assert detect(model, tmp_path / "out", *(tmp_path / name for name in names)) == 3
    found = found_in(tmp_path / "out")
    assert "leads out of it" in found["evil.tar/evil.jpg"][0]
    assert len(found["evil.tar/good.jpg"]) > 1
    assert "damaged archive" in found["none.tar"][0]
    assert any(name.startswith("cut.tar") and len(rows) == 1 for name, rows in found.items())
    assert "compressed archive" in found["packed.tar.gz"][0]
    assert not (tmp_path.parent / "evil.jpg").exists()


@pytest.fixture
def server(photos: Path) -> Iterator[str]:
    """An HTTP server of ``photos``."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(photos))
    ) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_urls_are_fetched_and_one_that_is_missing_fails_alone(
    model: str, tmp_path: Path, plain: dict[str, list[Any]], server: str
) -> None:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    assert detect(model, tmp_path / "out", f"{server}/a.jpg", f"{server}/sub/b.png", f"{server}/gone.jpg") == 3
    found = {name.partition("/")[2]: rows for name, rows in found_in(tmp_path / "out").items()}
    assert found["a.jpg"] == plain["a.jpg"]
    assert found["sub/b.png"] == plain["sub/b.png"]
    assert "cannot be fetched" in found["gone.jpg"][0]


@pytest.mark.slow
def test_a_server_that_takes_a_request_and_never_answers_fails_its_picture_alone(
    model: str, photos: Path, tmp_path: Path, plain: dict[str, list[Any]]
) -> None:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/slow.jpg"
        assert detect(model, tmp_path / "out", url, photos, "--read-timeout", 5) == 3
    found = found_in(tmp_path / "out")
    reason = next(rows[0] for name, rows in found.items() if name.endswith("slow.jpg"))
    assert reason.startswith("not read within 5 s")
    assert {name: found[name] for name in plain} == plain


def test_a_folder_of_an_object_store_is_searched_and_patterns_match(
    model: str, photos: Path, tmp_path: Path, plain: dict[str, list[Any]]
) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name in plain:
        store.pipe(f"/bucket/{name}", (photos / name).read_bytes())
    store.pipe("/bucket/notes.txt", b"")
    assert detect(model, tmp_path / "out", "memory://bucket/") == 0
    assert found_in(tmp_path / "out") == {f"bucket/{name}": rows for name, rows in plain.items()}
    assert detect(model, tmp_path / "some", "memory://bucket/*.jpg") == 0
    assert list(found_in(tmp_path / "some")) == ["bucket/a.jpg"]


def test_without_fsspec_a_url_exits_2_and_says_what_to_install(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert detect(model, tmp_path / "out", "https://example.org/a.jpg") == 2
    assert "pip install 'ddetr-cli[remote]'" in capsys.readouterr().err


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A video of ten frames, written by PyAV without loss."""
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for number in range(10):
            values = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / f"{number:06d}.png")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_the_frames_of_a_video_are_pictures(model: str, tmp_path: Path, clip: Path) -> None:
    assert detect(model, tmp_path / "out", clip) == 0
    assert detect(model, tmp_path / "frames", tmp_path / "0000*.png") == 0
    frames = {f"clip.mkv/{name.removesuffix('.png')}": rows for name, rows in found_in(tmp_path / "frames").items()}
    assert len(frames) == 10
    assert found_in(tmp_path / "out") == frames
    assert detect(model, tmp_path / "some", clip, "--every", 4, "--shard", "2/2") == 0
    assert list(found_in(tmp_path / "some")) == ["clip.mkv/000004", "clip.mkv/000008"]


def test_a_video_that_is_none_or_has_no_decoder_fails_by_name(
    model: str, photos: Path, tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none.mp4").write_bytes(b"no video")
    assert detect(model, tmp_path / "out", tmp_path / "none.mp4", photos) == 3
    assert "damaged video" in found_in(tmp_path / "out")["none.mp4"][0]
    monkeypatch.setitem(sys.modules, "av", None)
    assert detect(model, tmp_path / "without", clip, photos) == 3
    assert "pip install 'ddetr-cli[video]'" in found_in(tmp_path / "without")["clip.mkv"][0]


def test_only_the_first_pictures_are_taken_where_a_limit_says_so(model: str, photos: Path, tmp_path: Path) -> None:
    assert detect(model, tmp_path / "out", photos, "--limit", 2) == 0
    assert list(found_in(tmp_path / "out")) == ["a.jpg", "sub/b.png"]


@pytest.mark.slow
def test_a_hundred_thousand_files_are_found_quickly_in_a_stable_order_and_little_memory(tmp_path: Path) -> None:
    from ddetr_cli.detect.sources import find_inputs

    for folder in range(100):
        (tmp_path / "in" / f"{folder:02d}").mkdir(parents=True)
        for number in range(1000):
            (tmp_path / "in" / f"{folder:02d}" / f"{number:04d}.jpg").touch()
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ddetr_cli.detect.sources import find_inputs\n"
        # Of ru_maxrss a part is the memory of the process that started it.
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "found = find_inputs([sys.argv[1]])\n"
        "print(len(found.images), peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "in")], capture_output=True, text=True)
    count, kib = map(int, done.stdout.split())
    assert count == 100_000
    assert kib < 300 * 1024
    one, other = (find_inputs([str(tmp_path / "in" / "07")]) for _ in range(2))
    assert [image.name for image in one.images] == [image.name for image in other.images]
