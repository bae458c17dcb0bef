from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddetr_cli.errors import CheckpointError, UsageError
from ddetr_cli.model.backbone import BACKBONES, ResNet
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import PRESETS
from ddetr_cli.weights import load_backbone


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, Tensor]:
    """What torchvision's file holds, by its names: the classifier and the norms' counters too."""
    torch.manual_seed(0)
    state = {name: tensor.half() for name, tensor in ResNet(BACKBONES["resnet50"]).state_dict().items()}
    counters = {n.replace("running_var", "num_batches_tracked"): torch.tensor(0) for n in state if "running_var" in n}
    return {**state, **counters, "fc.weight": torch.zeros(10, 2048), "fc.bias": torch.zeros(10)}


def test_torchvisions_file_fills_the_whole_trunk(torchvision_state: dict[str, Tensor], tmp_path: Path):
    torch.save(torchvision_state, tmp_path / "mine.pth")
    tensors = load_backbone(PRESETS["r50"], str(tmp_path / "mine.pth"))
    with torch.device("meta"):
        trunk = build_detector(PRESETS["r50"]).backbone
    result = trunk.load_state_dict(tensors, strict=True, assign=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(trunk.conv1.weight, torchvision_state["conv1.weight"].float())


def test_none_means_random_weights():
    assert load_backbone(PRESETS["r50"], "none") == {}
    assert load_backbone(PRESETS["tiny"], "none") == {}


def test_tiny_has_no_imagenet_weights():
    with pytest.raises(UsageError, match="preset tiny starts from random weights"):
        load_backbone(PRESETS["tiny"])


def test_a_file_of_something_else_is_refused(torchvision_state: dict[str, Tensor], tmp_path: Path):
    path = tmp_path / "other.pth"
    torch.save({"layer5.weight": torch.zeros(1)} | torchvision_state, path)
    with pytest.raises(CheckpointError, match=r"not a ResNet-50 of torchvision \(1 tensors.*layer5\.weight"):
        load_backbone(PRESETS["r50"], str(path))


def test_the_published_name_with_other_bytes_is_damaged(
    torchvision_state: dict[str, Tensor], tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("DDETR_WEIGHTS", str(tmp_path))
    torch.save(torchvision_state, tmp_path / "resnet50-0676ba61.pth")
    with pytest.raises(CheckpointError, match="sha256 does not begin with 0676ba61"):
        load_backbone(PRESETS["r50"])


def test_numbers_that_are_not_finite_are_refused(torchvision_state: dict[str, Tensor], tmp_path: Path):
    state = dict(torchvision_state)
    state["bn1.bias"] = torch.full((64,), float("nan"))
    torch.save(state, tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load_backbone(PRESETS["r50"], str(tmp_path / "mine.pth"))
