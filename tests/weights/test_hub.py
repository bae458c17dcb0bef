from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddetr_cli.errors import CheckpointError, UsageError
from ddetr_cli.weights import hub
from ddetr_cli.weights.hub import Found, find_backbone, find_model

CLOSED = "http://127.0.0.1:9"  # the discard port: nobody listens, a connection is refused at once
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the caches of whoever runs it, nor the network."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDETR_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "weights").mkdir()


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    return path


def _cache(tmp_path: Path, hub_id: str, name: str = "model.safetensors") -> Path:
    """A file in the Hugging Face cache, laid out as its client lays it out."""
    repository = tmp_path / "hf" / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return _touch(repository / "snapshots" / COMMIT / name)


class TestPaths:
    @pytest.mark.parametrize("url", ["https://example.org/w.pth", "http://x/y", "ftp://x/y", "file:///x", "hf://a/b"])
    def test_a_url_is_a_usage_error(self, url: str):
        with pytest.raises(UsageError, match="Give a file or a hub id") as caught:
            find_model(url)
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize("spec", ["", "  "])
    def test_nothing_is_a_usage_error(self, spec: str):
        with pytest.raises(UsageError, match="empty"):
            find_model(spec)

    def test_an_existing_path_wins_over_every_name(self, tmp_path: Path):
        for name in ("r50", "demo", "owner/name"):
            _touch(tmp_path / name)
            assert find_model(name).path == Path(name)

    def test_a_run_means_its_best_checkpoint_and_without_one_its_last(self, tmp_path: Path):
        last = _touch(tmp_path / "run" / "last.safetensors")
        assert find_model(str(tmp_path / "run")).path == last
        best = _touch(tmp_path / "run" / "best.safetensors")
        assert find_model(str(tmp_path / "run")).path == best

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_a_folder_of_save_pretrained_is_a_model(self, tmp_path: Path, name: str):
        assert find_model(str(_touch(tmp_path / "saved" / name).parent)).path == tmp_path / "saved" / name

    def test_a_folder_of_the_authors_training_is_its_last_checkpoint(self, tmp_path: Path):
        _touch(tmp_path / "run" / "checkpoint0049.pth")
        assert find_model(str(_touch(tmp_path / "run" / "checkpoint.pth").parent)).path.name == "checkpoint.pth"

    def test_a_folder_without_a_model_is_refused_with_the_names_looked_for(self, tmp_path: Path):
        with pytest.raises(
            CheckpointError, match=r"holds no model \(looked for best\.safetensors, last\.safetensors"
        ):
            find_model(str(tmp_path))

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_a_model_in_several_pieces_is_refused_with_what_makes_it_one(self, tmp_path: Path, name: str):
        _touch(tmp_path / f"{name}.index.json")
        with pytest.raises(CheckpointError, match=rf"in several pieces \({name}\.index\.json\).*max_shard_size"):
            find_model(str(tmp_path))

    @pytest.mark.parametrize(
        "spec", ["absent.pth", "runs/absent.pth", "/nowhere/at/all", "a/b/c", "x" * 5000, "r51", "a\0b"]
    )
    def test_what_is_neither_path_nor_name_is_refused(self, spec: str):
        with pytest.raises(CheckpointError, match="no such model") as caught:
            find_model(spec)
        assert "--model demo" in str(caught.value)


class TestOrder:
    def test_our_folder_comes_first_safetensors_before_pth(self, tmp_path: Path):
        _cache(tmp_path, "SenseTime/deformable-detr")
        pth = _touch(tmp_path / "weights" / "r50.pth")
        assert find_model("r50") == hub.Found(pth, "r50")
        tensors = _touch(tmp_path / "weights" / "r50.safetensors")
        assert find_model("r50") == hub.Found(tensors, "r50")

    def test_a_hub_ids_slash_is_written_as_two_dashes(self, tmp_path: Path):
        path = _touch(tmp_path / "weights" / "someone--cells-v1.2.pth")
        assert find_model("someone/cells-v1.2") == hub.Found(path, None)

    def test_a_published_id_and_its_preset_share_their_file(self, tmp_path: Path):
        path = _touch(tmp_path / "weights" / "SenseTime--deformable-detr-single-scale-dc5.pth")
        for spec in ("SenseTime/deformable-detr-single-scale-dc5", "r50-single-scale-dc5"):
            assert find_model(spec) == hub.Found(path, "r50-single-scale-dc5")

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_the_hugging_face_cache_comes_second_and_needs_no_network(self, tmp_path: Path, name: str):
        path = _cache(tmp_path, "SenseTime/deformable-detr", name)
        assert find_model("r50") == hub.Found(path, "r50")

    def test_the_default_folder_is_in_the_users_cache(self, monkeypatch):
        monkeypatch.delenv("DDETR_WEIGHTS")
        monkeypatch.setenv("HOME", "/home/someone")
        assert hub.weights_folder() == Path("/home/someone/.cache/ddetr/weights")


class TestNotFound:
    def _message(self, spec: str) -> str:
        start = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            find_model(spec)
        assert time.monotonic() - start < 15  # the hub's own client retries for half a minute
        assert caught.value.exit_code == 5
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_without_a_network_one_sentence_names_the_file_its_place_and_the_demo(self, tmp_path: Path, capfd):
        message = self._message("r50-refine")
        assert message == (
            "r50-refine: weights not found and not downloaded (no connection to 127.0.0.1). "
            f"Put {CLOSED}/SenseTime/deformable-detr-with-box-refine/resolve/main/model.safetensors at "
            f"{tmp_path}/weights/r50-refine.safetensors (or a .pth beside it), "
            "or try --model demo, which needs no download."
        )
        assert capfd.readouterr() == ("", "")

    def test_offline_mode_is_honoured(self, tmp_path: Path, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        message = self._message("someone/cells")
        assert "(HF_HUB_OFFLINE is set)" in message
        assert f"{tmp_path}/weights/someone--cells.safetensors" in message

    def test_a_name_that_does_not_resolve_is_no_connection(self, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
        assert "(no connection to no-such-host.invalid)" in self._message("r50")

    def test_tiny_has_nothing_to_download(self):
        assert "tiny: has no published weights" in self._message("tiny")

    def test_a_demo_missing_from_the_installation_is_said(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(hub.resources, "files", lambda _: tmp_path)
        assert "demo: missing from the installation" in self._message("demo")
        demo = _touch(tmp_path / "demo.safetensors")
        assert find_model("demo").path == demo


class _Server(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download asks for; ``files`` by path, ``asked`` what was requested."""

    files: dict[str, bytes] = {}  # noqa: RUF012  shared on purpose: one server per test
    asked: list[str] = []  # noqa: RUF012
    cut = False

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        body = content or b""
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if self.cut else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[_Server]]]:
    handler = type("Handler", (_Server,), {"files": {}, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", handler
        running.shutdown()
        thread.join()


def _in_a_process_of_its_own(tmp_path: Path, spec: str, endpoint: str) -> subprocess.CompletedProcess[str]:
    """``find_model`` where the hub's environment variables are read from the start."""
    program = f"from ddetr_cli.weights.hub import find_model; print(find_model({spec!r}).path)"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_id_is_downloaded_once_with_its_config_and_without_a_word(tmp_path: Path, server, name: str):
    url, handler = server
    prefix = "/someone/cells/resolve/main"
    handler.files |= {
        f"{prefix}/config.json": b'{"model_type": "deformable_detr"}',
        f"{prefix}/preprocessor_config.json": b'{"size": {"shortest_edge": 480}}',
        f"{prefix}/{name}": b"the weights",
    }
    result = _in_a_process_of_its_own(tmp_path, "someone/cells", url)
    assert (result.returncode, result.stderr) == (0, "")
    path = Path(result.stdout.strip())
    assert path.read_bytes() == b"the weights"
    assert (path.parent / "config.json").is_file()
    assert (path.parent / "preprocessor_config.json").is_file()  # which tells the size the model was trained at
    assert path.is_relative_to(tmp_path / "home")

    handler.asked.clear()
    again = _in_a_process_of_its_own(tmp_path, "someone/cells", url)
    assert again.stdout == result.stdout
    assert handler.asked == []


def test_a_repository_without_weights_is_refused_with_the_reason(tmp_path: Path, server):
    url, handler = server
    handler.files["/someone/cells/resolve/main/config.json"] = b"{}"
    result = _in_a_process_of_its_own(tmp_path, "someone/cells", url)
    assert result.returncode != 0
    assert "someone/cells has neither model.safetensors nor pytorch_model.bin" in result.stderr


def test_a_repository_in_several_pieces_is_refused_as_such(tmp_path: Path, server):
    url, handler = server
    handler.files["/someone/cells/resolve/main/model.safetensors.index.json"] = b"{}"
    result = _in_a_process_of_its_own(tmp_path, "someone/cells", url)
    assert result.returncode != 0
    assert "someone/cells is in several pieces, and only one whole file is read" in result.stderr


class TestBackbone:
    def test_it_is_looked_for_in_our_folder_then_torchs(self, tmp_path: Path):
        theirs = _touch(tmp_path / "torch" / "hub" / "checkpoints" / "resnet50-0676ba61.pth")
        assert find_backbone(None) == theirs
        ours = _touch(tmp_path / "weights" / "resnet50-0676ba61.pth")
        assert find_backbone(None) == ours
        assert find_backbone("other.pth") == Path("other.pth")

    def test_it_is_downloaded_whole_or_not_at_all(self, tmp_path: Path, server, monkeypatch):
        url, handler = server
        handler.files["/resnet50-0676ba61.pth"] = b"x" * 5_000_000
        monkeypatch.setattr(hub, "TORCHVISION_URL", url)
        handler.cut = True
        with pytest.raises(CheckpointError, match="not downloaded"):
            find_backbone(None)
        assert list((tmp_path / "weights").iterdir()) == []
        handler.cut = False
        said: list[str] = []
        path = find_backbone(None, said.append)
        assert path == tmp_path / "weights" / "resnet50-0676ba61.pth"
        assert path.stat().st_size == 5_000_000
        assert said == [f"downloading {url}/resnet50-0676ba61.pth"]
        assert list(path.parent.iterdir()) == [path]

    def test_unreachable_it_is_one_sentence_that_names_the_file_and_the_way_out(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(hub, "TORCHVISION_URL", CLOSED)
        with pytest.raises(CheckpointError) as caught:
            find_backbone(None)
        assert str(caught.value) == (
            "backbone weights: not found and not downloaded (no connection to 127.0.0.1). "
            f"Put {CLOSED}/resnet50-0676ba61.pth at {tmp_path}/weights/resnet50-0676ba61.pth, "
            "or start from random weights with --backbone-weights none."
        )

    def test_an_address_is_a_usage_error(self):
        with pytest.raises(UsageError, match="a URL"):
            find_backbone("https://example.org/resnet50.pth")


class TestPublishedFiles:
    """The files of torchvision and of DETR's authors, known by the checksum in their names."""

    NAME = "fasterrcnn_resnet50_fpn_coco-258fb6c6"

    def test_faster_rcnn_is_looked_for_under_both_names_in_our_folder_then_in_torchs(self, tmp_path: Path):
        theirs = _touch(tmp_path / "torch" / "hub" / "checkpoints" / f"{self.NAME}.pth")
        assert find_model("fasterrcnn-r50-fpn") == Found(theirs, "fasterrcnn-r50-fpn")
        for name in (f"{self.NAME}.pth", "fasterrcnn-r50-fpn.safetensors"):
            ours = _touch(tmp_path / "weights" / name)
            assert find_model("fasterrcnn-r50-fpn").path == ours

    def test_detr_is_found_under_its_authors_name(self, tmp_path: Path):
        theirs = _touch(tmp_path / "torch" / "hub" / "checkpoints" / "detr-r50-dc5-f0fb7ef5.pth")
        for name in ("detr-r50-dc5", "facebook/detr-resnet-50-dc5"):
            assert find_model(name) == Found(theirs, "detr-r50-dc5")
        ours = _touch(tmp_path / "weights" / "detr-r50-e632da11.pth")
        assert find_model("detr-r50") == Found(ours, "detr-r50")

    def test_faster_rcnn_is_downloaded_from_torchvisions_server(self, tmp_path: Path, server, monkeypatch):
        url, handler = server
        handler.files[f"/{self.NAME}.pth"] = b"the weights"
        monkeypatch.setattr(hub, "TORCHVISION_URL", url)
        said: list[str] = []
        found = find_model("fasterrcnn-r50-fpn", said.append)
        assert found == Found(tmp_path / "weights" / f"{self.NAME}.pth", "fasterrcnn-r50-fpn")
        assert found.path.read_bytes() == b"the weights"
        assert said == [f"downloading {url}/{self.NAME}.pth"]

    def test_the_servers_address_is_torchvisions_own(self):
        detection = pytest.importorskip("torchvision.models.detection")
        weights = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1
        assert weights.url == f"{hub.TORCHVISION_URL}/{self.NAME}.pth"

    @pytest.mark.parametrize("offline", [False, True])
    def test_unreachable_it_is_one_sentence_that_names_the_file_and_the_way_out(
        self, tmp_path: Path, monkeypatch, offline: bool
    ):
        from huggingface_hub import constants

        monkeypatch.setattr(hub, "TORCHVISION_URL", CLOSED)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        reason = "HF_HUB_OFFLINE is set" if offline else "no connection to 127.0.0.1"
        with pytest.raises(CheckpointError) as caught:
            find_model("fasterrcnn-r50-fpn")
        assert str(caught.value) == (
            f"fasterrcnn-r50-fpn: not found and not downloaded ({reason}). Put {CLOSED}/{self.NAME}.pth at "
            f"{tmp_path}/weights/{self.NAME}.pth, or try --model demo, which needs no download."
        )
