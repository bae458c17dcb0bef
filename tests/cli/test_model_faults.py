"""What ``ddetr detect`` says to model files that are hostile, damaged or something else: one line, exit code 5."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from ddetr_cli.cli.app import main
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import ModelConfig
from ddetr_cli.weights.layouts import to_authors

RUN = "import sys; from ddetr_cli.cli.app import main; sys.exit(main())"
STATE = {"a.weight": torch.arange(4096.0).reshape(64, 64), "a.bias": torch.zeros(64)}
SMALL = ModelConfig(
    "custom", hidden_dim=32, encoder_layers=1, decoder_layers=1, ffn_dim=32, queries=7, classes=3, image_size=64
)
NO_CHECKSUM = "carries no checksum, so damage to its numbers would not be noticed"

Detect = Callable[..., tuple[int, str]]


@pytest.fixture
def detect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Detect:
    """Runs ``detect`` on one small picture; gives the exit code and what stderr showed."""
    Image.new("RGB", (64, 48), "grey").save(tmp_path / "photo.png")

    def run(model: object, *options: str) -> tuple[int, str]:
        arguments = [
            "-m",
            str(model),
            "-o",
            str(tmp_path / "out"),
            "--device",
            "cpu",
            "--image-size",
            "64",
            "-t",
            "0",
        ]
        code = main(["detect", str(tmp_path / "photo.png"), *arguments, *options])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def refusal(detect: Detect, tmp_path: Path) -> Callable[..., str]:
    """The one line that a model file is refused with: exit code 5, no traceback, no advice to trust it, no output."""

    def run(model: object, *options: str) -> str:
        code, err = detect(model, *options)
        assert code == 5, err
        assert err.startswith(f"ddetr: error: {model}: ") and err.count("\n") == 1, err
        for word in ("Traceback", "weights_only", "Errno", "trust the source", "allowlist", "internal error"):
            assert word not in err
        assert not (tmp_path / "out").exists()
        return err.removeprefix(f"ddetr: error: {model}: ").rstrip("\n")

    return run


@pytest.fixture(scope="module")
def authors_state() -> dict[str, Tensor]:
    """A small Deformable DETR under the authors' names."""
    torch.manual_seed(0)
    return to_authors(build_detector(SMALL).state_dict(), SMALL)


@pytest.fixture
def authors_file(authors_state: dict[str, Tensor], tmp_path: Path) -> Path:
    torch.save({"model": authors_state, "epoch": 49}, tmp_path / "authors.pth")
    return tmp_path / "authors.pth"


class _Runs:
    """Unpickled without a guard, it calls ``function`` with ``argument``."""

    def __init__(self, function: Any, argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.function, (self.argument,)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize(("function", "name"), [(os.system, "posix.system"), (eval, "eval")])
def test_c1_a_file_with_code_is_refused_and_its_code_never_runs(
    refusal: Callable[..., str], tmp_path: Path, form: str, function: Any, name: str
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    call = _Runs(function, f"touch {canary}" if function is os.system else f"open({str(canary)!r}, 'w')")
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(call))
    else:
        torch.save({"model": STATE, "x": call}, path, _use_new_zipfile_serialization=form == "zip")
    message = refusal(path)
    assert message.startswith("contains code (") and name in message.split(")")[0]
    assert message.endswith("), refused. Do not trust it: get the weights elsewhere.")
    assert not canary.exists()


def test_c1_a_tar_archive_of_before_torch_0_2_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    import tarfile

    path = tmp_path / "old.pth"
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")
    assert refusal(path) == "not a checkpoint (a tar archive). Give a .pth or .safetensors file."


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (torch.nn.Linear(3, 3), "torch.nn.modules.linear.Linear"),
        ({"model": STATE, "rng": np.random.default_rng(0).bit_generator.state | {"a": np.arange(3)}}, "numpy."),
        ({"model": STATE, "out": PosixPath("/tmp")}, "pathlib.PosixPath"),
        ({"model": STATE, "rng": random.Random(0)}, "random.Random"),
    ],
)
def test_c2_foreign_objects_are_refused_by_the_name_of_their_class(
    refusal: Callable[..., str], tmp_path: Path, content: Any, named: str
) -> None:
    torch.save(content, tmp_path / "objects.pth")
    message = refusal(tmp_path / "objects.pth")
    assert message.startswith("contains objects that are not weights (") and named in message
    assert message.endswith("refused. Give a file with the weights alone, best as safetensors.")


def test_c3_the_authors_layout_with_their_namespace_loads(
    detect: Detect, authors_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "authors.pth"
    torch.save({"model": authors_state, "args": argparse.Namespace(dilation=False, lr=2e-4), "epoch": 49}, path)
    code, err = detect(path)
    assert code == 0
    assert "0 missing, 0 left over" in err


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99])
def test_c4_a_truncated_file_is_called_so_with_its_size(
    refusal: Callable[..., str], authors_state: dict[str, Tensor], tmp_path: Path, suffix: str, percent: int
) -> None:
    path = tmp_path / f"cut.{suffix}"
    state = {name: tensor for name, tensor in authors_state.items() if name.startswith("transformer.")}
    if suffix == "pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    size = path.stat().st_size * percent // 100
    os.truncate(path, size)
    message = refusal(path)
    assert message.startswith("truncated or damaged (") and f"{size} bytes" in message
    assert message.endswith("Copy or download it again.")


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_c5_a_flipped_bit_in_a_checkpoint_of_ours_is_refused(
    refusal: Callable[..., str], model: str, tmp_path: Path
) -> None:
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(Path(model).read_bytes())
    _flip(path, path.stat().st_size - 1000)
    assert refusal(path) == ("damaged (its numbers do not match their checksum). Copy or download it again.")


def test_c5_in_a_file_of_others_it_is_warned_that_none_would_be_noticed(detect: Detect, authors_file: Path) -> None:
    code, err = detect(authors_file)
    assert code == 0
    assert f"ddetr: warning: {authors_file}: {NO_CHECKSUM}" in err


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<html>403</html>", "an HTML page, perhaps an error message saved by a download"),
        (b"\n<!DOCTYPE html><title>Not found</title>", "an HTML page, perhaps an error message saved by a download"),
        (b"not a checkpoint\n" * 10, "a text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
         "a Git LFS pointer: run git lfs pull to fetch the real file"),
        (bytes(range(200, 256)) * 9, "unknown content"),
        (b"\x1f\x8b" + bytes(90), "gzip-compressed: unpack it first"),
    ],
)  # fmt: skip
def test_c6_what_is_no_checkpoint_is_named_for_what_it_is(
    refusal: Callable[..., str], tmp_path: Path, content: bytes, what: str
) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    assert refusal(tmp_path / "model.pth") == f"not a checkpoint ({what}). Give a .pth or .safetensors file."


def test_c6_pipes_devices_and_folders_are_refused_without_waiting(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "folder.pth").mkdir()
    not_regular = "not a regular file (a pipe, socket or device). Give a checkpoint file."
    assert refusal(tmp_path / "fifo.pth") == not_regular
    assert refusal("/dev/zero") == not_regular
    assert refusal(tmp_path / "folder.pth").startswith("holds no model (looked for best.safetensors, ")


def test_c6_a_zip_without_weights_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "random.pth", "w") as archive:
        archive.writestr("hello.txt", "hi")
    assert refusal(tmp_path / "random.pth").startswith("not a checkpoint (a zip archive without data.pkl)")


def _rewritten(path: Path, change: Callable[[bytes], bytes], compression: int) -> None:
    """The archive again, its first storage changed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(data) if name.endswith("data/0") else data)


def test_c7_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    path, photo = tmp_path / "bomb.pth", tmp_path / "photo.png"
    Image.new("RGB", (64, 48)).save(photo)
    torch.save({"w": torch.zeros(4)}, path)
    _rewritten(path, lambda data: bytes(512 << 20), zipfile.ZIP_DEFLATED)
    program = RUN.replace(
        # Not getrusage's maximum, which a child inherits from the process that forked it.
        "sys.exit(main())", "code = main(); import re; "
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10); sys.exit(code)"
    )  # fmt: skip
    command = [sys.executable, "-c", program, "detect", str(photo), "-m", str(path), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 5
    assert "refused (compressed records, which torch.save never writes: perhaps a zip bomb)" in done.stderr
    assert int(done.stdout) < 1024  # mebibytes, torch and all; inflated it is 512 more


def test_c7_a_storage_shorter_than_its_tensor_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "short.pth"
    torch.save(STATE, path)
    _rewritten(path, lambda data: data[:16], zipfile.ZIP_STORED)
    assert refusal(path).startswith("truncated or damaged (")


def test_c7_a_view_of_160_gigabytes_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(200_000, 200_000)}, tmp_path / "expanded.pth")
    assert refusal(tmp_path / "expanded.pth") == (
        "tensor 'w' claims 160000000000 bytes and stores 4 (an expanded view). Give the original file."
    )


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, 20, "tensor 'b' follows a hole"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, 12, "tensor 'b' overlaps another"),
        ({"a": ENTRY | {"dtype": "F99"}}, 8, "tensor 'a' has dtype 'F99'"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2), 8, "'a' is listed twice"),
        (b'{"a": nonsense}', 0, "its header is not JSON"),
    ],
)
def test_c8_a_safetensors_header_that_lies_is_refused(
    refusal: Callable[..., str], tmp_path: Path, header: Any, size: int, reason: str
) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
    message = refusal(path)
    assert message.startswith(f"not a sound safetensors file ({reason}")
    assert message.endswith("Copy or download it again.")


def test_c8_a_header_of_more_than_100_megabytes_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b'{"a"')
    assert "its header claims 100000001 bytes, limit 100000000" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_c9_weights_that_are_not_finite_are_refused_by_the_tensors_name(
    refusal: Callable[..., str], authors_state: dict[str, Tensor], tmp_path: Path, value: float
) -> None:
    state = authors_state | {"input_proj.1.0.bias": torch.full((32,), value)}
    torch.save({"model": state}, tmp_path / "nan.pth")
    assert refusal(tmp_path / "nan.pth") == (
        "input_proj.1.0.bias holds NaN or infinity (training diverged, or the file is damaged). "
        "Give an earlier checkpoint."
    )


def test_c10_missing_left_over_and_misshapen_tensors_are_listed_with_a_guess(
    refusal: Callable[..., str], authors_state: dict[str, Tensor], tmp_path: Path
) -> None:
    state = {name: tensor for name, tensor in authors_state.items() if "encoder.layers.0.norm" not in name}
    state |= {f"strange.{i}": torch.zeros(1) for i in range(7)}
    state["transformer.reference_points.weight"] = torch.zeros(4, 32)
    torch.save({"model": state}, tmp_path / "other.pth")
    assert refusal(tmp_path / "other.pth") == (
        "does not fit the model that most of it describes (this is a 4-level, 7-query, 3-class model): "
        "4 missing (transformer.encoder.layers.0.norm1.weight, transformer.encoder.layers.0.norm1.bias, "
        "transformer.encoder.layers.0.norm2.weight, transformer.encoder.layers.0.norm2.bias); "
        "7 left over (strange.0, strange.1, strange.2, strange.3, strange.4 ...); "
        "1 of another shape (transformer.reference_points.weight: (4, 32) in the file, (2, 32) in the model). "
        "Give a whole checkpoint of this model, or name another variant with --preset."
    )


def test_c10_another_variant_or_family_than_named_is_refused_with_a_guess(
    refusal: Callable[..., str], authors_file: Path
) -> None:
    message = refusal(authors_file, "--preset", "r50-single-scale")
    assert message.startswith("does not fit r50-single-scale (this is a 4-level, 7-query, 3-class model): ")
    message = refusal(authors_file, "--preset", "detr-r50")
    assert message == (
        "preset detr-r50: not what the file holds (this is a 4-level, 7-query, 3-class model). "
        "Name another preset, or none."
    )


def test_c10_an_image_classifier_is_named(refusal: Callable[..., str], tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(1), "layer4.0.conv1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    assert refusal(tmp_path / "resnet.pth") == (
        "not a model read here (this is an image classifier, which can only start a backbone). "
        "Give a Deformable DETR, a DETR or torchvision's Faster R-CNN."
    )


def test_c11_class_heads_for_another_number_of_classes_than_the_rest_are_refused(
    refusal: Callable[..., str], authors_state: dict[str, Tensor], tmp_path: Path
) -> None:
    state = authors_state | {"class_embed.0.bias": torch.zeros(91)}
    torch.save({"model": state}, tmp_path / "heads.pth")
    assert "class_embed.0.bias: (91,) in the file, (3,) in the model" in refusal(tmp_path / "heads.pth")


def _with_header(source: str, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint of ours with another header over the same tensors."""
    with safetensors.safe_open(source, "pt") as file:
        header = json.loads(file.metadata()["ddetr"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header)
    safetensors.torch.save_file(tensors, target, {"ddetr": json.dumps(header)})
    return target


def test_c12_a_checkpoint_of_a_newer_ddetr_is_refused_by_its_version(
    refusal: Callable[..., str], model: str, tmp_path: Path
) -> None:
    path = _with_header(
        model, tmp_path / "new.safetensors", lambda header: header.update(format=2, ddetr_version="2.1.0")
    )
    message = refusal(path)
    assert message.startswith("made by ddetr 2.1.0 (checkpoint format 2, this is ddetr ")
    assert message.endswith("Update ddetr.")
    path = _with_header(model, path, lambda header: header["config"].update(wings=2))
    assert refusal(path) == "model configuration: unknown keys wings (written by a newer ddetr). Update ddetr."


def test_c12_a_checkpoint_from_before_there_were_families_loads(detect: Detect, model: str, tmp_path: Path) -> None:
    path = _with_header(model, tmp_path / "old.safetensors", lambda header: header["config"].pop("family", None))
    assert detect(path)[0] == 0


@pytest.mark.parametrize("url", ["https://example.org/model.pth", "http://example.org/model.pth"])
def test_c16_a_url_is_a_usage_error(detect: Detect, url: str) -> None:
    code, err = detect(url)
    assert code == 2
    assert f"{url}: a URL (models are not fetched from addresses). Give a file or a hub id." in err


def test_c17_content_decides_and_not_the_suffix(
    detect: Detect, model: str, authors_file: Path, tmp_path: Path
) -> None:
    swapped = tmp_path / "ours.pth"
    swapped.write_bytes(Path(model).read_bytes())
    authors_file.rename(tmp_path / "theirs.safetensors")
    assert detect(swapped)[0] == 0
    assert detect(tmp_path / "theirs.safetensors", "--overwrite")[0] == 0


def test_c18_an_old_torch_reads_safetensors_and_no_pickles(
    refusal: Callable[..., str], detect: Detect, model: str, authors_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert refusal(authors_file) == (
        "not read with torch 2.9.1+cpu (its restricted reader can be made to run code: CVE-2025-32434, "
        "CVE-2026-24747). Install torch 2.10 or newer, or give a safetensors file."
    )
    assert detect(model)[0] == 0
