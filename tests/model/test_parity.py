"""The seven DETR systems against transformers' own models, with the same random weights.

transformers is an oracle here and nothing else: its model is built in the published configuration, every tensor made
random, its answers noted, its weights written as it writes them (safetensors with v4 names, a state dict with v5
names), and read by us.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ddetr_cli.classes import COCO_TABLE
from ddetr_cli.presets import DETR, PRESETS
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
    "detr-r50": {},
    "detr-r50-dc5": {"dilation": True},
}
TOTALS = {
    "r50": 40_069_665,
    "r50-refine": 40_849_660,
    "r50-two-stage": 41_181_529,
    "r50-single-scale": 34_066_593,
    "r50-single-scale-dc5": 34_066_593,
    "detr-r50": 41_524_768,
    "detr-r50-dc5": 41_524_768,
}
# Tensors in the authors' files.
KEYS = {
    "r50": 561, "r50-refine": 597, "r50-two-stage": 630, "r50-single-scale": 549, "r50-single-scale-dc5": 549,
    "detr-r50": 458, "detr-r50-dc5": 458,
}  # fmt: skip
# Canvas (h, w) and the (h, w) of each image on it. Of the pair, every level and the last map of DETR see padding.
CANVASES = {
    "padded pair": ((192, 208), ((168, 208), (192, 144))),
    "301x403": ((301, 403), ((301, 403),)),
    "64x200": ((64, 200), ((64, 200),)),
    "33x65": ((33, 65), ((33, 65),)),
    "32x32": ((32, 32), ((32, 32),)),
}
# Ours and transformers' scores of one proposal differ by up to 2e-6.
SCORE_ROUNDING = 5e-6


@dataclass
class Case:
    """One system: transformers' model, the folder of its files, and ours from its safetensors file."""

    preset: str
    oracle: nn.Module
    folder: Path
    loaded: LoadedModel


def _canvas(name: str) -> tuple[Tensor, Tensor]:
    (H, W), sizes_hw = CANVASES[name]
    generator = torch.Generator().manual_seed(5)
    pixels = torch.zeros(len(sizes_hw), 3, H, W)
    is_padding = torch.ones(len(sizes_hw), H, W, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes_hw):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        is_padding[i, :h, :w] = False
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
                # DETR's queries all start at zero: under a flat attention they would all see the same.
                is_sharp = "encoder_attn.q_proj" in name or "encoder_attn.k_proj" in name
                tensor.add_(noise(tensor, (4.0 if is_sharp else 0.5) / math.sqrt(tensor[0].numel())))
            else:
                tensor.add_(noise(tensor, 0.1))


def _oracle(preset: str, **changes: Any) -> nn.Module:
    is_detr = PRESETS[preset].family == DETR
    make_config = transformers.DetrConfig if is_detr else transformers.DeformableDetrConfig
    make_model = transformers.DetrForObjectDetection if is_detr else transformers.DeformableDetrForObjectDetection
    trunk = {"use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": "resnet50"}
    config = make_config(num_labels=91, **VARIANTS[preset], **(changes or trunk))
    torch.manual_seed(0)
    model = make_model(config).eval()
    if PRESETS[preset].refine_boxes:
        # transformers 5 ties the class heads of refining models; the published weights have one per layer.
        model.class_embed = nn.ModuleList([copy.deepcopy(head) for head in model.class_embed])
        if config.two_stage:
            model.model.decoder.class_embed = model.class_embed
    _randomise(model)
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = _oracle(request.param)
    oracle.save_pretrained(folder)
    torch.save(oracle.state_dict(), folder / "v5.bin")
    return Case(request.param, oracle, folder, load_model(str(folder / "model.safetensors")))


def _order_of_ties(theirs: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices that put our queries (B,Q) beside transformers', exchanged among proposals of nearly equal score only.

    Which of two proposals comes first is a matter of float32's last bits where their scores differ by no more.
    """
    scores = theirs.enc_outputs_class[..., 0].topk(logits.shape[1]).values
    run = torch.nn.functional.pad((scores.diff().abs() > SCORE_ROUNDING).cumsum(1), (1, 0))
    costs = (logits[:, None] - theirs.logits[:, :, None]).abs().amax(-1)
    costs = costs.masked_fill(run[:, None] != run[:, :, None], 1e9)
    queries = torch.stack([torch.from_numpy(linear_sum_assignment(cost)[1]) for cost in costs.numpy()])
    return torch.arange(len(logits))[:, None], queries


@pytest.mark.parametrize("canvas", list(CANVASES))
def test_the_output_equals_transformers(case: Case, canvas: str, monkeypatch: pytest.MonkeyPatch):
    pixels, is_padding = _canvas(canvas)
    if case.loaded.config.two_stage:
        h, w = CANVASES[canvas][0]
        positions = sum(math.ceil(h / stride) * math.ceil(w / stride) for stride in (8, 16, 32, 64))
        # transformers fails with fewer positions than queries; we then have as many queries as positions.
        monkeypatch.setattr(case.oracle.config, "two_stage_num_proposals", min(300, positions))
    with torch.inference_mode():
        theirs = case.oracle(pixel_values=pixels, pixel_mask=(~is_padding).long())
        ours = case.loaded.model(pixels, is_padding if is_padding.any() else None)
    logits, boxes = ours.logits, ours.boxes_cxcywh
    if case.loaded.config.two_stage:
        images, queries = _order_of_ties(theirs, logits)
        logits, boxes = logits[images, queries], boxes[images, queries]
    # The oracle must say something that depends on image, query and class, or agreement would mean little: a hundred
    # times what may differ. Not on the smallest canvases: where DETR sees one position, all its queries see the same.
    if len(pixels) > 1:
        assert float(theirs.logits.std(dim=1).mean()) > 1e-2
        assert float(theirs.logits.std(dim=2).mean()) > 0.1
        assert float((theirs.logits[0] - theirs.logits[1]).abs().max()) > 1e-2
        assert float(theirs.pred_boxes.std(dim=1).min()) > 1e-4
    logits_error = float((logits - theirs.logits).abs().max())
    boxes_error = float((boxes - theirs.pred_boxes).abs().max())
    print(f"{case.preset}, {canvas}: logits {logits_error:.1e}, boxes {boxes_error:.1e}")
    assert logits_error <= 1e-4
    assert boxes_error <= 1e-5


@pytest.mark.parametrize("preset", ["r50", "detr-r50"])
def test_a_model_on_transformers_own_resnet_is_read_and_computes_the_same(preset: str, tmp_path: Path):
    """As of ``use_timm_backbone=False`` and the hub's revisions called no_timm."""
    stages = ["stage4"] if PRESETS[preset].family == DETR else ["stage2", "stage3", "stage4"]
    oracle = _oracle(
        preset, use_timm_backbone=False, backbone_config=transformers.ResNetConfig(out_features=stages),
        encoder_layers=1, decoder_layers=2,
    )  # fmt: skip
    oracle.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    pixels, is_padding = _canvas("padded pair")
    with torch.inference_mode():
        theirs = oracle(pixel_values=pixels, pixel_mask=(~is_padding).long())
        ours = loaded.model(pixels, is_padding)
    assert float((ours.logits - theirs.logits).abs().max()) <= 1e-4
    assert float((ours.boxes_cxcywh - theirs.pred_boxes).abs().max()) <= 1e-5


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
    pixels, is_padding = _canvas("33x65")
    with torch.inference_mode():
        first, second = case.loaded.model(pixels, is_padding), again.model(pixels, is_padding)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.boxes_cxcywh, second.boxes_cxcywh)


def _assert_same_tensors(a: LoadedModel, b: LoadedModel) -> None:
    first, second = a.model.state_dict(), b.model.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
