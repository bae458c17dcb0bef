from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ddetr_cli.errors import CheckpointError
from ddetr_cli.weights.reader import MAX_BYTES, read_file

STATE = {"a": torch.arange(6.0)}


def _refusal(path: Path) -> str:
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    assert time.monotonic() - start < 10  # at once, on a machine that may be busy: not waiting for a writer
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "truncated or damaged (0 bytes)"),
        (b"\x93", "truncated or damaged, 1 bytes"),
        (b"not a checkpoint\n" * 10, "a text file"),
        (b"\n <!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"<html>403</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (gzip.compress(b"x" * 100, mtime=0), "gzip-compressed"),
        (bytes(range(256)) * 8, "unknown content"),
        (bytes(4096), "unknown content"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(tmp_path: Path, content: bytes, named: str):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert named in _refusal(path)


def test_a_tar_archive_is_named(tmp_path: Path):
    (tmp_path / "x.txt").write_text("x")
    path = tmp_path / "weights.pth"
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "x.txt", "x.txt")
    assert "a tar archive" in _refusal(path)


def test_pipes_devices_folders_and_missing_files_are_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo.pth")
    assert "not a regular file" in _refusal(tmp_path / "fifo.pth")
    assert "not a regular file" in _refusal(Path("/dev/zero"))
    assert "a folder" in _refusal(tmp_path)
    assert "no such file" in _refusal(tmp_path / "absent.pth")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read" in _refusal(tmp_path / "loop")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(tmp_path: Path):
    path = tmp_path / "secret.pth"
    path.write_bytes(b"x")
    path.chmod(0)
    assert "Permission denied" in _refusal(path)


def test_a_file_larger_than_any_detector_is_refused(tmp_path: Path):
    path = tmp_path / "huge.pth"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: it takes no room
    assert "too large" in _refusal(path)


def test_content_decides_and_not_the_suffix(tmp_path: Path):
    torch.save(STATE, tmp_path / "pickle.safetensors")
    safetensors.torch.save_file(STATE, tmp_path / "tensors.pth")
    for name in ("pickle.safetensors", "tensors.pth"):
        assert torch.equal(read_file(tmp_path / name).tensors["a"], STATE["a"])


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module.", "model.", "model._orig_mod."])
@pytest.mark.parametrize("name", ["model.level_embed", "transformer.level_embed", "roi_heads.box_head.fc6.bias"])
def test_names_of_wrappers_around_a_model_are_left_out(tmp_path: Path, wrapper: str, name: str):
    wrapped = {f"{wrapper}{name}": torch.zeros(2), f"{wrapper}class_embed.0.bias": torch.zeros(2)}
    wrapped |= {"total_ops": torch.zeros(1), "criterion.empty_weight": torch.zeros(2)}
    torch.save(wrapped, tmp_path / "x.pth")
    safetensors.torch.save_file(wrapped, tmp_path / "x.safetensors")
    for file in ("x.pth", "x.safetensors"):
        assert read_file(tmp_path / file).tensors.keys() == {name, "class_embed.0.bias", "total_ops"}


@pytest.mark.parametrize(
    "names",
    [
        ["module.a", "b"],
        ["model.backbone.a", "model.level_embed"],
        ["total_ops", "module.total_params"],
        ["criterion.a", "b"],
        [],
    ],
)
def test_what_is_not_before_every_name_or_belongs_to_the_model_stays(tmp_path: Path, names: list[str]):
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "x.pth")
    assert list(read_file(tmp_path / "x.pth").tensors) == names


def test_the_digest_is_that_of_the_file(tmp_path: Path):
    torch.save(STATE, tmp_path / "x.pth")
    assert read_file(tmp_path / "x.pth").sha256 == hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()


def test_safetensors_are_read_by_an_old_torch(tmp_path: Path, monkeypatch):
    safetensors.torch.save_file(STATE, tmp_path / "x.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    assert read_file(tmp_path / "x.safetensors").tensors.keys() == STATE.keys()
