"""The five variants against transformers' own Deformable DETR, with the same random weights.

transformers is an oracle here and nothing else: its model is built, every tensor made random, its answer noted, its
weights written as it writes them (safetensors with v4 names, a state dict with v5 names), and read by us.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddetr_cli.classes import COCO_TABLE
from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.presets import PRESETS
from ddetr_cli.weights import LoadedModel, load_model
from ddetr_cli.weights.layouts import to_authors

transformers = pytest.importorskip("transformers", reason="transformers, the oracle of these tests, is not installed")
pytest.importorskip("timm", reason="timm, from which transformers takes the trunk, is not installed")

VARIANTS: dict[str, dict[str, Any]] = {
    "r50": {},
    "r50-refine": {"with_box_refine": True},
    "r50-two-stage": {"with_box_refine": True, "two_stage": True},
    "r50-single-scale": {"num_feature_levels": 1},
    "r50-single-scale-dc5": {"num_feature_levels": 1, "dilation": True},
}
TOTALS = {
    "r50": 40_069_665,
    "r50-refine": 40_849_660,
    "r50-two-stage": 41_181_529,
    "r50-single-scale": 34_066_593,
    "r50-single-scale-dc5": 34_066_593,
}
KEYS = {
    "r50": 561, "r50-refine": 597, "r50-two-stage": 630, "r50-single-scale": 549, "r50-single-scale-dc5": 549,
}  # fmt: skip


@dataclass
class Case:
    """One variant: transformers' files and answer, and ours from its safetensors file."""

    preset: str
    folder: Path
    pixels: Tensor
    is_padding: Tensor
    logits: Tensor
    boxes: Tensor
    loaded: LoadedModel
    output: DetectorOutput


def _padded_pair() -> tuple[Tensor, Tensor]:
    """Two images of different size on one canvas: 834 positions at four levels, enough for 300 proposals."""
    generator = torch.Generator().manual_seed(5)
    pixels, is_padding = torch.zeros(2, 3, 192, 208), torch.ones(2, 192, 208, dtype=torch.bool)
    for i, (height, width) in enumerate(((168, 208), (192, 176))):
        pixels[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        is_padding[i, :height, :width] = False
    return pixels, is_padding


def _randomise(model: nn.Module) -> None:
    """Move every tensor away from where initialisation left it, so that nothing is trivially zero, one or equal."""
    generator = torch.Generator().manual_seed(7)

    def noise(tensor: Tensor, scale: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * scale

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.startswith("model.backbone") and tensor.dim() > 1:
                tensor.mul_(1 + noise(tensor, 0.05))
            elif "query_position" in name or "level_embed" in name:
                tensor.copy_(noise(tensor, 1.0))
            elif "reference_points" in name:
                tensor.copy_(noise(tensor, 0.1))
            elif tensor.dim() > 1:
                tensor.add_(noise(tensor, 0.5 / math.sqrt(tensor[0].numel())))
            else:
                tensor.add_(noise(tensor, 0.1))


def _oracle(preset: str) -> nn.Module:
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=True, use_pretrained_backbone=False, backbone="resnet50", num_labels=91, **VARIANTS[preset]
    )
    torch.manual_seed(0)
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    if config.with_box_refine:
        # transformers 5 ties the class heads of refining models; the published weights have one per layer.
        model.class_embed = nn.ModuleList([copy.deepcopy(head) for head in model.class_embed])
        if config.two_stage:
            model.model.decoder.class_embed = model.class_embed
    _randomise(model)
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    pixels, is_padding = _padded_pair()
    oracle = _oracle(request.param)
    oracle.save_pretrained(folder)
    torch.save(oracle.state_dict(), folder / "v5.bin")
    with torch.inference_mode():
        theirs = oracle(pixel_values=pixels, pixel_mask=(~is_padding).long())
    del oracle
    loaded = load_model(str(folder / "model.safetensors"))
    with torch.inference_mode():
        output = loaded.model(pixels, is_padding)
    return Case(request.param, folder, pixels, is_padding, theirs.logits, theirs.pred_boxes, loaded, output)


def test_the_output_equals_transformers(case: Case):
    # The oracle must say something that depends on image, query and class, or agreement would mean little.
    assert float(case.logits.std(dim=(1, 2)).min()) > 0.1
    assert float((case.logits[0] - case.logits[1]).abs().max()) > 0.1
    assert float(case.boxes.std(dim=1).min()) > 1e-3
    logits_error = float((case.output.logits - case.logits).abs().max())
    boxes_error = float((case.output.boxes_cxcywh - case.boxes).abs().max())
    print(f"{case.preset}: logits {logits_error:.1e}, boxes {boxes_error:.1e}")
    assert logits_error <= 1e-4
    assert boxes_error <= 1e-5


def test_the_variant_is_recognised_from_the_file(case: Case):
    assert case.loaded.config == PRESETS[case.preset]
    assert case.loaded.classes == COCO_TABLE
    assert not case.loaded.report.missing and not case.loaded.report.left_over
    assert sum(p.numel() for p in case.loaded.model.parameters()) == TOTALS[case.preset]
    assert not any(p.is_meta for p in case.loaded.model.state_dict().values())
    assert not case.loaded.model.training


def test_v5_names_give_the_same_tensors(case: Case):
    # No config.json counts for this one but the same folder's, so DC5 is still known.
    again = load_model(str(case.folder / "v5.bin"))
    assert again.config == case.loaded.config
    _assert_same_tensors(again, case.loaded)


def test_the_authors_layout_gives_the_identical_result(case: Case):
    state = to_authors(case.loaded.model.state_dict(), case.loaded.config)
    assert len(state) == KEYS[case.preset]
    path = case.folder / "authors.pth"
    dilation = case.loaded.config.dilation
    torch.save({"model": state, "args": argparse.Namespace(dilation=dilation, lr=2e-4), "epoch": 49}, path)
    again = load_model(str(path))
    assert again.config == case.loaded.config
    _assert_same_tensors(again, case.loaded)
    with torch.inference_mode():
        output = again.model(case.pixels, case.is_padding)
    assert torch.equal(output.logits, case.output.logits)
    assert torch.equal(output.boxes_cxcywh, case.output.boxes_cxcywh)


def _assert_same_tensors(a: LoadedModel, b: LoadedModel) -> None:
    first, second = a.model.state_dict(), b.model.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_two_stage_with_fewer_positions_than_queries_equals_transformers_with_that_many_proposals(tmp_path: Path):
    pixels = torch.randn(1, 3, 64, 72, generator=torch.Generator().manual_seed(1))
    positions = 8 * 9 + 4 * 5 + 2 * 3 + 1 * 2
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=True, use_pretrained_backbone=False, backbone="resnet50", num_labels=91,
        with_box_refine=True, two_stage=True, two_stage_num_proposals=positions, encoder_layers=1, decoder_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    oracle = transformers.DeformableDetrForObjectDetection(config).eval()
    _randomise(oracle)
    oracle.save_pretrained(tmp_path)
    with torch.inference_mode():
        theirs = oracle(pixel_values=pixels)
    loaded = load_model(str(tmp_path))
    assert loaded.config.queries == positions
    loaded.model.transformer.config = replace(loaded.config, queries=300)
    with torch.inference_mode():
        ours = loaded.model(pixels, torch.zeros(1, 64, 72, dtype=torch.bool))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.boxes_cxcywh, theirs.pred_boxes, rtol=0, atol=1e-5)
