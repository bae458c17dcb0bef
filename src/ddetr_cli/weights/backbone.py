"""ImageNet weights to start the r50 presets from: torchvision's IMAGENET1K_V1 ResNet-50."""

from __future__ import annotations

import torch
from torch import Tensor

from ddetr_cli.errors import CheckpointError, UsageError
from ddetr_cli.model.backbone import BACKBONES, ResNet
from ddetr_cli.presets import ModelConfig
from ddetr_cli.weights.hub import BACKBONE_NAME, Announce, find_backbone
from ddetr_cli.weights.layouts import is_counter
from ddetr_cli.weights.reader import read_file


def load_backbone(
    config: ModelConfig, spec: str | None = None, *, announce: Announce | None = None
) -> dict[str, Tensor]:
    """Tensors for ``model.backbone.load_state_dict``: the file ``spec``, or found where models are, or downloaded.

    ``"none"`` gives an empty table: the trunk stays random. Raises CheckpointError where the file is absent, damaged
    or no ResNet-50, UsageError for a preset whose trunk has no ImageNet weights.
    """
    if spec == "none":
        return {}
    if config.backbone != "resnet50":
        raise UsageError(
            f"--backbone-weights: preset {config.preset} starts from random weights (none exist). "
            "Leave the option out."
        )
    path = find_backbone(spec, announce)
    stored = read_file(path)
    digest = BACKBONE_NAME.rpartition("-")[2]
    if path.name == f"{BACKBONE_NAME}.pth" and not stored.sha256.startswith(digest):
        raise CheckpointError(
            f"{path}: damaged (its sha256 does not begin with {digest}). Delete it, so that it is downloaded again."
        )
    with torch.device("meta"):
        target = ResNet(BACKBONES[config.backbone]).state_dict()
    given = {name: t for name, t in stored.tensors.items() if not name.startswith("fc.") and not is_counter(name)}
    unfit = sorted(target.keys() ^ given.keys())
    unfit += [name for name in target.keys() & given.keys() if target[name].shape != given[name].shape]
    if unfit:
        raise CheckpointError(
            f"{path}: not a ResNet-50 of torchvision ({len(unfit)} tensors missing, left over or of another shape: "
            f"{', '.join(unfit[:5])}). Give resnet50-0676ba61.pth, or none."
        )
    tensors = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in given.items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise CheckpointError(f"{path}: holds NaN or infinity. Copy or download it again.")
    return tensors
