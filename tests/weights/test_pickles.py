from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import resource
import time
import warnings
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch

from ddetr_cli.errors import CheckpointError
from ddetr_cli.weights import pickles
from ddetr_cli.weights.reader import read_file

STATE = {"a.weight": torch.arange(4096.0).reshape(64, 64), "a.bias": torch.zeros(64)}


def _refusal(path: Path) -> str:
    """The message a file is refused with; it is one line and never advises to switch the guard off."""
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    message = str(caught.value)
    assert caught.value.exit_code == 5
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "weights_only" not in message and "trust the source" not in message
    return message


class _Runs:
    """Unpickled without a guard, it would call ``function`` with ``argument``."""

    def __init__(self, function: Any, argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.function, (self.argument,)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle 2", "plain pickle 5"])
@pytest.mark.parametrize("function", [os.system, eval])
def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path, form: str, function: Any):
    canary = tmp_path / "canary"
    call = f"touch {canary}" if function is os.system else f"open({str(canary)!r}, 'w')"
    path = tmp_path / "evil.pth"
    content = {"model": STATE, "x": _Runs(function, call)}
    if form.startswith("plain"):
        path.write_bytes(pickle.dumps(_Runs(function, call), protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = _refusal(path)
    assert "contains code (" in message
    assert ("system" if function is os.system else "eval") in message
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (torch.nn.Linear(3, 3), "torch.nn.modules.linear.Linear"),
        ({"model": STATE, "best": np.float64(0.4)}, "numpy"),
        ({"model": STATE, "out": PosixPath("/tmp")}, "pathlib"),
        ({"model": STATE, "rng": random.Random(0)}, "random.Random"),
    ],
)
def test_a_file_with_foreign_objects_is_refused_by_the_name_of_their_class(tmp_path: Path, content: Any, named: str):
    path = tmp_path / "objects.pth"
    torch.save(content, path)
    assert named in _refusal(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_the_authors_namespace_is_read_as_plain_values(tmp_path: Path, is_zip: bool):
    path = tmp_path / "authors.pth"
    arguments = argparse.Namespace(lr=2e-4, dilation=True, backbone="resnet50", lr_backbone_names=["backbone.0"])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]).state_dict()
    torch.save(
        {"model": STATE, "optimizer": optimizer, "args": arguments, "epoch": 49},
        path,
        _use_new_zipfile_serialization=is_zip,
    )
    stored = read_file(path)
    assert stored.arguments == {"lr": 2e-4, "dilation": True, "backbone": "resnet50"}
    assert stored.tensors.keys() == STATE.keys()
    assert all(torch.equal(stored.tensors[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("percent", [1, 50, 90, 99])
def test_a_truncated_file_is_called_truncated_with_its_size(tmp_path: Path, percent: int, is_zip: bool):
    path = tmp_path / "cut.pth"
    torch.save(STATE, path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()[: path.stat().st_size * percent // 100]
    path.write_bytes(content)
    message = _refusal(path)
    assert f"truncated or damaged ({len(content)} bytes)" in message
    assert "Errno" not in message


def test_a_damaged_pickle_is_refused(tmp_path: Path):
    path = tmp_path / "flipped.pth"
    torch.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[content.find(b"a.weight")] ^= 0xFF
    path.write_bytes(bytes(content))
    assert "damaged" in _refusal(path)


def test_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path: Path):
    buffer, path = io.BytesIO(), tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in good.namelist():
            if name.endswith("data/0"):
                with bomb.open(name, "w", force_zip64=True) as record:
                    for _ in range(256):
                        record.write(bytes(1 << 20))
            else:
                bomb.writestr(name, good.read(name))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "compressed records" in _refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kibibytes; inflated it is 256 MiB


def test_records_that_claim_more_than_the_file_are_refused(tmp_path: Path):
    path = tmp_path / "overlap.pth"
    torch.save({"w": torch.zeros(1 << 20)}, path)
    content = bytearray(path.read_bytes())
    # Point the central directory's entry of another record at the same bytes, by size: sizes are what is believed.
    directory = content.rfind(b"PK\x01\x02", 0, content.rfind(b"PK\x05\x06"))
    for offset in (20, 24):  # compressed and uncompressed size
        content[directory + offset : directory + offset + 4] = (64 << 20).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    assert "claim more than its" in _refusal(path)


def test_a_storage_shorter_than_its_tensor_is_refused(tmp_path: Path):
    buffer, path = io.BytesIO(), tmp_path / "short.pth"
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as short:
        for name in good.namelist():
            short.writestr(name, good.read(name)[:16] if name.endswith("data/0") else good.read(name))
    assert "damaged" in _refusal(path)


def test_an_expanded_view_of_160_gigabytes_is_refused(tmp_path: Path):
    path = tmp_path / "expanded.pth"
    torch.save({"w": torch.zeros(1).expand(200_000, 200_000)}, path)
    assert "claims 160000000000 bytes and stores 4" in _refusal(path)


@pytest.mark.parametrize("kind", ["sparse", "complex", "quantized", "of 8 bits"])
def test_tensors_that_are_not_plain_are_refused(tmp_path: Path, kind: str):
    path = tmp_path / f"{kind}.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = {
            "sparse": lambda: torch.eye(3).to_sparse(),
            "complex": lambda: torch.zeros(2, dtype=torch.complex64),
            "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "of 8 bits": lambda: torch.zeros(2, dtype=torch.float8_e4m3fn),
        }[kind]()
        torch.save({"w": tensor}, path)
    message = _refusal(path)
    other = "sparse, quantized or without numbers"
    said = {"complex": "of torch.complex64", "of 8 bits": "of torch.float8_e4m3fn"}.get(kind, other)
    assert f"tensor 'w' is {said}. Give plain weights." in message


def test_archives_that_are_no_checkpoint_are_told_apart(tmp_path: Path):
    for name, records, expected in (
        ("random.pth", ["hello.txt"], "a zip archive without data.pkl"),
        ("script.pth", ["m/data.pkl", "m/constants.pkl", "m/code/x.py"], "a TorchScript archive"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for record in records:
                archive.writestr(record, "hi")
        assert expected in _refusal(tmp_path / name)


def test_a_pickle_nested_without_end_is_refused_quickly(tmp_path: Path):
    path = tmp_path / "nested.pth"
    path.write_bytes(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    start = time.monotonic()
    assert "a plain pickle" in _refusal(path)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "w": torch.zeros(1)}, {1: torch.zeros(1)}, "text"])
def test_what_holds_no_state_dict_is_refused(tmp_path: Path, content: Any):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert "holds" in _refusal(path)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
def test_weights_are_found_under_the_names_people_use_without_the_wrappers_prefix(tmp_path: Path, key: str | None):
    path = tmp_path / "wrapped.pth"
    state = {f"module.{name}": tensor for name, tensor in STATE.items()}
    torch.save({key: state, "epoch": 1} if key else state, path)
    assert read_file(path).tensors.keys() == STATE.keys()


def test_an_old_torch_reads_no_pickles_and_the_message_names_the_holes(tmp_path: Path, monkeypatch):
    path = tmp_path / "good.pth"
    torch.save(STATE, path)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    message = _refusal_of_old_torch(path)
    assert "CVE-2025-32434" in message and "CVE-2026-24747" in message


def _refusal_of_old_torch(path: Path) -> str:
    with pytest.raises(CheckpointError, match=r"torch 2\.9\.1") as caught:
        pickles.read(path)
    return str(caught.value)


def test_bytes_after_the_archive_do_no_harm(tmp_path: Path):
    path = tmp_path / "trailing.pth"
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes() + b"x" * 1000)
    assert read_file(path).tensors.keys() == STATE.keys()
