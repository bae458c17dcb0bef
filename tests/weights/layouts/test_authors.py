from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import PRESETS
from ddetr_cli.weights.layouts.authors import from_authors, to_authors

# Tensors in a checkpoint of the authors' code, counted with their code.
KEYS = {"r50": 561, "r50-refine": 597, "r50-two-stage": 630, "r50-single-scale": 549, "r50-single-scale-dc5": 549}


def _state(preset: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_detector(PRESETS[preset]).state_dict()


@pytest.mark.parametrize("preset", list(KEYS))
def test_the_authors_layout_has_as_many_tensors_as_their_checkpoints(preset: str):
    assert len(to_authors(_state(preset), PRESETS[preset])) == KEYS[preset]


@pytest.mark.parametrize("preset", ["detr-r50", "detr-r50-dc5"])
def test_detrs_tensors_are_ours_with_another_name_for_the_trunk(preset: str):
    state = _state(preset)
    written = to_authors(state, PRESETS[preset])
    assert {name.replace("backbone.0.body.", "backbone.") for name in written} == state.keys()
    assert written["class_embed.weight"].shape == (92, 256)
    assert "transformer.decoder.norm.weight" in written


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("backbone.conv1.weight", "backbone.0.body.conv1.weight"),
        ("backbone.layer4.2.bn3.running_var", "backbone.0.body.layer4.2.bn3.running_var"),
        ("input_proj.3.1.bias", "input_proj.3.1.bias"),
        ("transformer.level_embed", "transformer.level_embed"),
        ("transformer.decoder.layers.5.norm3.weight", "transformer.decoder.layers.5.norm3.weight"),
        ("class_embed.6.weight", "transformer.decoder.class_embed.6.weight"),
        ("bbox_embed.0.layers.2.bias", "transformer.decoder.bbox_embed.0.layers.2.bias"),
    ],
)  # fmt: skip
def test_names_go_to_the_authors_and_back(ours: str, theirs: str):
    assert theirs in to_authors({ours: torch.ones(1)}, PRESETS["r50-two-stage"])
    assert from_authors(theirs) == ours
