from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ddetr_cli.classes import ClassTable
from ddetr_cli.errors import CheckpointError, OutputError
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DeformableDetr
from ddetr_cli.presets import ModelConfig
from ddetr_cli.weights import load_model, save_checkpoint
from ddetr_cli.weights.reader import read_file

CONFIG = ModelConfig(
    "small", backbone="resnet-tiny", hidden_dim=32, encoder_layers=1, decoder_layers=2, ffn_dim=32, queries=5,
    refine_boxes=True, two_stage=True, classes=3, image_size=128,
)  # fmt: skip
CLASSES = ClassTable((7, "x9", 12), ("cell", 'a "quoted" \u00fcber-name', None))


@pytest.fixture(scope="module")
def model() -> DeformableDetr:
    torch.manual_seed(0)
    model = build_detector(CONFIG)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def saved(model: DeformableDetr, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    save_checkpoint(path, model, CLASSES)
    return path


def _with_header(saved: Path, path: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with fields of its header replaced, its checksum left as it was."""
    stored = read_file(saved)
    header = json.loads(stored.metadata["ddetr"]) | changes
    safetensors.torch.save_file(stored.tensors, path, {"ddetr": json.dumps(header)})
    return path


def test_what_was_saved_is_loaded_bit_for_bit(model: DeformableDetr, saved: Path):
    loaded = load_model(str(saved))
    assert loaded.config == CONFIG
    assert loaded.classes == CLASSES
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert not loaded.model.training
    assert loaded.report.notes == ()


def test_the_digest_returned_is_that_of_the_file(model: DeformableDetr, tmp_path: Path):
    digest = save_checkpoint(tmp_path / "x.safetensors", model, CLASSES)
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert digest == load_model(str(tmp_path / "x.safetensors")).sha256


def test_half_precision_halves_the_file_and_comes_back_as_float32(model: DeformableDetr, saved: Path, tmp_path: Path):
    path = tmp_path / "half.safetensors"
    save_checkpoint(path, model, CLASSES, half=True)
    assert path.stat().st_size < 0.55 * saved.stat().st_size
    loaded = load_model(str(path)).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.half().float() if tensor.is_floating_point() else tensor)


def test_numbers_too_large_for_half_precision_stay_whole(model: DeformableDetr, tmp_path: Path):
    other = build_detector(CONFIG)
    other.load_state_dict(model.state_dict())
    other.get_buffer("backbone.bn1.running_var")[0] = 70_000.0
    save_checkpoint(tmp_path / "half.safetensors", other, CLASSES, half=True)
    loaded = load_model(str(tmp_path / "half.safetensors")).model
    assert float(loaded.get_buffer("backbone.bn1.running_var")[0]) == 70_000.0


def test_every_flipped_bit_among_the_numbers_is_noticed(saved: Path, tmp_path: Path):
    content = saved.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path = tmp_path / "flipped.safetensors"
    for share in (0.0, 0.3, 0.7, 0.999):
        flipped = bytearray(content)
        flipped[start + int(share * (len(content) - start))] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match="do not match their checksum"):
            load_model(str(path))


def test_a_renamed_tensor_is_noticed(saved: Path, tmp_path: Path):
    stored = read_file(saved)
    tensors = dict(stored.tensors)
    tensors["class_embed.0.bias"], tensors["class_embed.1.bias"] = (
        tensors["class_embed.1.bias"] + 1,
        tensors["class_embed.0.bias"],
    )
    safetensors.torch.save_file(tensors, tmp_path / "swapped.safetensors", stored.metadata)
    with pytest.raises(CheckpointError, match="checksum"):
        load_model(str(tmp_path / "swapped.safetensors"))


def test_a_checkpoint_of_a_newer_format_is_refused_by_its_version(saved: Path, tmp_path: Path):
    path = _with_header(saved, tmp_path / "new.safetensors", format=2, ddetr_version="2.3")
    with pytest.raises(CheckpointError, match=r"made by ddetr 2\.3 \(checkpoint format 2.*Update ddetr"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": {**CONFIG.to_dict(), "from_the_future": 1}}, "from_the_future"),
        ({"config": {**CONFIG.to_dict(), "encoder_layers": 10**9}}, "encoder_layers is '1000000000'"),
        ({"config": {**CONFIG.to_dict(), "queries": "many"}}, "queries is 'many'"),
        ({"config": {**CONFIG.to_dict(), "two_stage": 1}}, "two_stage is '1'"),
        ({"config": {**CONFIG.to_dict(), "refine_boxes": False}}, "header is damaged"),
        ({"config": {**CONFIG.to_dict(), "backbone": "vgg"}}, "header is damaged"),
        ({"config": {**CONFIG.to_dict(), "hidden_dim": 40}}, "40 channels"),
        ({"config": [1]}, "header is damaged"),
        ({"classes": [[1, "a"]]}, "header is damaged"),
        ({"classes": [[1, "a"], [2, "b"], [None, 3]]}, "header is damaged"),
        ({"classes": 7}, "header is damaged"),
        ({"format": "x"}, "made by ddetr"),
        ({"sha256": "00"}, "checksum"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(saved: Path, tmp_path: Path, changes: dict[str, Any], reason: str):
    path = _with_header(saved, tmp_path / "odd.safetensors", **changes)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(path))
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["not json", "[]", "{}", "[" * 100_000])
def test_a_header_that_is_no_table_is_refused(saved: Path, tmp_path: Path, text: str):
    safetensors.torch.save_file(read_file(saved).tensors, tmp_path / "x.safetensors", {"ddetr": text})
    with pytest.raises(CheckpointError, match="header is damaged"):
        load_model(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(model: DeformableDetr, tmp_path: Path, value: float):
    other = build_detector(CONFIG)
    with torch.no_grad():
        other.get_parameter("bbox_embed.0.layers.1.weight")[0, 0] = value
    with pytest.raises(CheckpointError, match=r"bbox_embed\.0\.layers\.1\.weight: not saved"):
        save_checkpoint(tmp_path / "x.safetensors", other, CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_checkpoint_and_no_other_file(
    model: DeformableDetr, saved: Path, tmp_path: Path, monkeypatch
):
    path = tmp_path / "last.safetensors"
    path.write_bytes(saved.read_bytes())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_checkpoint(path, model, CLASSES)
    assert path.read_bytes() == saved.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_an_output_error(model: DeformableDetr, tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="not written"):
        save_checkpoint(tmp_path / "file" / "x.safetensors", model, CLASSES)


def test_extra_metadata_is_stored_and_does_not_disturb(model: DeformableDetr, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, model, CLASSES, extra={"epoch": "12"})
    assert read_file(path).metadata["epoch"] == "12"
    assert load_model(str(path)).config == CONFIG


def test_a_class_table_of_another_length_is_a_programming_mistake(model: DeformableDetr, tmp_path: Path):
    with pytest.raises(ValueError, match="3 in the model"):
        save_checkpoint(tmp_path / "x.safetensors", model, ClassTable((1,), ("a",)))


def test_a_checkpoint_tells_its_variant_whatever_its_file_is_called(saved: Path, tmp_path: Path):
    path = tmp_path / "weights.pth"
    path.write_bytes(saved.read_bytes())
    assert load_model(str(path)).config == replace(CONFIG)
