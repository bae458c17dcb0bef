"""Small detectors on a ResNet-50 in the layouts of others, for the tests that read foreign files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr_cli.classes import COCO_NAMES
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import ModelConfig
from ddetr_cli.weights.layouts import to_authors

# Half the memory and the time of every test: the tests of the numbers themselves say so and use float32.
SMALL = ModelConfig(
    "custom", hidden_dim=32, encoder_layers=1, decoder_layers=2, ffn_dim=32, queries=7, classes=5, image_size=800
)

Authors = Callable[..., Path]


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    """Random tensors under the authors' names, as float16; every number of a layer differs from its neighbours'."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = build_detector(config)
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand(tensor.shape) * 0.1)
    return to_authors({name: tensor.half() for name, tensor in model.state_dict().items()}, config)


@pytest.fixture(scope="session")
def states() -> Callable[..., dict[str, Tensor]]:
    """Random states by configuration, each made once."""
    made: dict[ModelConfig, dict[str, Tensor]] = {}

    def state(**changes: Any) -> dict[str, Tensor]:
        config = replace(SMALL, **changes)
        if config not in made:
            made[config] = random_state(config)
        return dict(made[config])

    return state


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a state as the authors' ``.pth``; keyword arguments become their ``args``."""

    def write(state: Mapping[str, Tensor], name: str = "checkpoint.pth", **arguments: Any) -> Path:
        path = tmp_path / name
        content = {"model": dict(state), "epoch": 49}
        torch.save(content | ({"args": argparse.Namespace(**arguments)} if arguments else {}), path)
        return path

    return write


def as_detrex(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state of Deformable DETR as detrex's converter names it; 91 classes become COCO's 80."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        old = name
        if name.startswith("backbone.0.body."):
            trunk = name.removeprefix("backbone.0.body.")
            trunk = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", trunk)
            trunk = re.sub(r"bn(\d)", r"conv\1.norm", trunk)
            trunk = trunk.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            name = f"backbone.{trunk}" if trunk.startswith("res") else f"backbone.stem.{trunk}"
        elif name.startswith("input_proj."):
            level, part = int(name.split(".")[1]), {"0": "conv", "1": "norm"}[name.split(".")[2]]
            place = f"convs.{level}" if level < 3 else f"extra_convs.{level - 3}"
            name = f"neck.{place}.{part}.{name.rsplit('.', 1)[1]}"
        elif name.startswith("transformer.encoder.layers"):
            name = _in_layer(name, {"self_attn": "attentions.0", "norm1": "norms.0", "norm2": "norms.1"})
        elif name.startswith("transformer.decoder.layers"):
            name = _in_layer(
                name,
                {"self_attn": "attentions.0.attn", "cross_attn": "attentions.1"} | _DECODER_NORMS,
            )
        name = name.replace("level_embed", "level_embeds").replace("query_embed", "query_embedding")
        name = name.replace(".linear1.", ".ffns.0.layers.0.0.").replace(".linear2.", ".ffns.0.layers.1.")
        out[name] = tensor[list(COCO_NAMES)] if "class_embed" in old and len(tensor) == 91 else tensor
    return out


def as_mmdetection(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state of Deformable DETR as mmdetection 3 names it, whose projections have no bias."""
    tops = {
        "level_embed": "level_embed", "reference_points": "reference_points_fc", "enc_output": "memory_trans_fc",
        "enc_output_norm": "memory_trans_norm", "pos_trans": "pos_trans_fc", "pos_trans_norm": "pos_trans_norm",
    }  # fmt: skip
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        first, *rest = name.split(".")
        if first == "backbone":
            name = "backbone." + name.removeprefix("backbone.0.body.")
        elif first == "input_proj":
            if rest[1:] == ["0", "bias"]:
                continue
            place = f"convs.{rest[0]}" if int(rest[0]) < 3 else f"extra_convs.{int(rest[0]) - 3}"
            name = f"neck.{place}.{'conv' if rest[1] == '0' else 'gn'}.{rest[2]}"
        elif first == "query_embed":
            name = "query_embedding.weight"
        elif first == "class_embed":
            name = f"bbox_head.cls_branches.{'.'.join(rest)}"
            tensor = tensor[list(COCO_NAMES)] if len(tensor) == 91 else tensor
        elif first == "bbox_embed":
            name = f"bbox_head.reg_branches.{rest[0]}.{2 * int(rest[2])}.{rest[3]}"
        elif rest[0] in tops:
            name = ".".join([tops[rest[0]], *rest[1:]])
        elif rest[1] != "layers":
            continue  # it has no copies of the heads in the decoder
        else:
            words = {"norm1": "norms.0", "norm2": "norms.1"} if rest[0] == "encoder" else _DECODER_NORMS
            name = _in_layer(".".join(rest), {"linear1": "ffn.layers.0.0", "linear2": "ffn.layers.1"} | words)
            if rest[0] == "decoder":
                name = name.replace(".self_attn.", ".self_attn.attn.")
        out[name] = tensor
    return out


_DECODER_NORMS = {"norm1": "norms.1", "norm2": "norms.0", "norm3": "norms.2"}


def _in_layer(name: str, words: Mapping[str, str]) -> str:
    return ".".join(words.get(word, word) for word in name.split("."))


@pytest.fixture
def layout_of() -> dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    """From the authors' state of a Deformable DETR to that of another layout."""
    return {"detrex": as_detrex, "mmdetection": as_mmdetection}
