"""One training step, and five, against an independent computation in float64.

The forward pass is transformers' with our weights; losses, matching, gradient clipping and AdamW are written out here
from the papers, loop by loop, and share nothing with what they check. The trunk is a small ResNet of timm's.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ddetr_cli.model.backbone import BACKBONES, BackboneSpec, Bottleneck, FrozenBatchNorm2d
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DetectionModel
from ddetr_cli.presets import get_preset
from ddetr_cli.train.criterion import Criterion
from ddetr_cli.train.dataset import Batch
from ddetr_cli.train.loop import Trainer
from ddetr_cli.train.matcher import Target
from ddetr_cli.train.recipe import detr_recipe, paper_recipe, parameter_groups

transformers = pytest.importorskip("transformers", reason="transformers, the oracle of these tests, is not installed")
timm = pytest.importorskip("timm", reason="timm, from which transformers takes the trunk, is not installed")

TOLERANCE = 1e-5  # relative; our geometry is float32, transformers' float64
CLASSES, QUERIES, DECODER_LAYERS = 5, 7, 2
DIMENSIONS: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": DECODER_LAYERS, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_queries": QUERIES,
    "num_labels": CLASSES, "dropout": 0.0, "use_timm_backbone": True, "use_pretrained_backbone": False,
}  # fmt: skip
OURS: dict[str, Any] = {
    "backbone": "resnet-parity", "hidden_dim": 64, "encoder_layers": 2, "decoder_layers": DECODER_LAYERS, "heads": 4,
    "ffn_dim": 96, "queries": QUERIES, "classes": CLASSES, "dropout": 0.0,
}  # fmt: skip
TRUNK = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
SPEC = BackboneSpec(Bottleneck, 64, 7, TRUNK["channels"], TRUNK["layers"], FrozenBatchNorm2d, ("conv1", "layer1"))

DEFORMABLE = [
    "backbone.layer2.0.conv2.weight", "input_proj.3.0.weight", "transformer.level_embed",
    "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
    "transformer.encoder.layers.1.self_attn.attention_weights.weight",
    "transformer.decoder.layers.0.self_attn.in_proj_weight",
    "transformer.decoder.layers.1.cross_attn.sampling_offsets.bias",
]  # fmt: skip
ONE_STAGE = [*DEFORMABLE, "transformer.reference_points.weight", "query_embed.weight"]
TWO_STAGE = [*DEFORMABLE, "transformer.enc_output.weight", "transformer.pos_trans.weight"]
NAMED = {
    "r50": [*ONE_STAGE, "class_embed.0.weight", "bbox_embed.0.layers.0.weight"],
    "r50-refine": [*ONE_STAGE, "class_embed.1.weight", "bbox_embed.0.layers.2.bias"],
    "r50-two-stage": [*TWO_STAGE, "class_embed.2.weight", "bbox_embed.2.layers.1.weight"],
    "detr-r50": [
        "backbone.layer2.0.conv2.weight", "backbone.layer4.0.conv3.weight", "input_proj.weight",
        "transformer.encoder.layers.0.self_attn.in_proj_weight", "transformer.encoder.layers.1.linear1.weight",
        "transformer.decoder.layers.1.self_attn.in_proj_weight", "transformer.decoder.norm.weight",
        "transformer.decoder.layers.1.multihead_attn.out_proj.weight", "query_embed.weight", "class_embed.weight",
        "bbox_embed.layers.0.weight",
    ],
}  # fmt: skip


# ---------------------------------------------------------------- transformers' forward pass under our names

RENAMES = [
    (r"^model\.backbone\.model\.", "backbone."),
    (r"^model\.decoder\.(class|bbox)_embed\.", r"\1_embed."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^model\.input_proj(ection)?\.", "input_proj."),
    (r"^model\.", "transformer."),
    (r"\.mlp\.fc", ".linear"),
    (r"\.o_proj\.", ".out_proj."),
    (r"decoder\.layernorm\.", "decoder.norm."),
    (r"(encoder\.layers\.\d)\.self_attn_layer_norm", r"\1.norm1"),
    (r"(encoder\.layers\.\d)\.final_layer_norm", r"\1.norm2"),
    (r"(decoder\.layers\.\d)\.final_layer_norm", r"\1.norm3"),
]
# In this order the decoder of each family runs its norms; Deformable DETR's authors numbered theirs crosswise.
DECODER_RENAMES = {
    True: [(r"\.self_attn_layer_norm", ".norm2"), (r"\.encoder_attn_layer_norm", ".norm1"),
           (r"\.encoder_attn\.", ".cross_attn.")],
    False: [(r"\.self_attn_layer_norm", ".norm1"), (r"\.encoder_attn_layer_norm", ".norm2"),
            (r"\.encoder_attn\.", ".multihead_attn.")],
}  # fmt: skip


class Oracle:
    """transformers' model of one form, in float64, and its outputs for every layer."""

    def __init__(self, preset: str) -> None:
        self.is_deformable = preset != "detr-r50"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timm, "create_model", functools.partial(timm.create_model, **TRUNK))
            torch.manual_seed(0)
            if self.is_deformable:
                refine, two_stage = preset != "r50", preset == "r50-two-stage"
                config = transformers.DeformableDetrConfig(
                    **DIMENSIONS, with_box_refine=refine, two_stage=two_stage, two_stage_num_proposals=QUERIES
                )
                self.model = transformers.DeformableDetrForObjectDetection(config)
                if refine:  # transformers 5 ties the class heads of refining models; the authors do not
                    self.model.class_embed = nn.ModuleList([copy.deepcopy(head) for head in self.model.class_embed])
                if two_stage:
                    self.model.model.decoder.class_embed = self.model.class_embed
            else:
                self.model = transformers.DetrForObjectDetection(transformers.DetrConfig(**DIMENSIONS))
        self.model.double().train()
        _randomise(self.model)
        for name, parameter in self.model.named_parameters():
            is_frozen = "backbone" in name and not re.search(r"layer[234]", name)
            parameter.requires_grad_(not is_frozen)

    def layers(self, pixels: Tensor, is_padding: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits and boxes of every decoder layer, the last first, and of the proposals where there are any."""
        mask = (~is_padding).long()
        if not self.is_deformable:
            # transformers feeds each layer's normed output to the next when asked for all of them; the authors' DETR
            # norms only what goes to the heads. So it is not asked.
            hidden: list[Tensor] = []
            hooks = [
                layer.register_forward_hook(lambda _, __, out: hidden.append(out))
                for layer in self.model.model.decoder.layers
            ]
            self.model(pixel_values=pixels, pixel_mask=mask)
            for hook in hooks:
                hook.remove()
            normed = [self.model.model.decoder.layernorm(x) for x in hidden]
            pairs = [(self.model.class_labels_classifier(x), self.model.bbox_predictor(x).sigmoid()) for x in normed]
            return [pairs[-1], *pairs[:-1]]
        out = self.model(pixel_values=pixels, pixel_mask=mask)
        pairs = []
        for layer in range(DECODER_LAYERS):
            x = out.intermediate_hidden_states[:, layer]
            reference = out.intermediate_reference_points[:, layer - 1] if layer else out.init_reference_points
            reference = torch.log(reference.clamp(min=1e-5) / (1 - reference).clamp(min=1e-5))
            delta = self.model.bbox_embed[layer](x)
            if reference.shape[-1] == 2:
                reference = torch.cat([reference, torch.zeros_like(reference)], dim=-1)
            pairs.append((self.model.class_embed[layer](x), (delta + reference).sigmoid()))
        pairs = [pairs[-1], *pairs[:-1]]
        if out.enc_outputs_class is not None:
            pairs.append((out.enc_outputs_class, out.enc_outputs_coord_logits.sigmoid()))
        return pairs

    def under_our_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            for pattern, new in [*RENAMES, *DECODER_RENAMES[self.is_deformable]]:
                name = re.sub(pattern, new, name)
            renamed[name] = tensor
        for name in [n for n in renamed if ".q_proj." in n]:
            thirds = [renamed.pop(name.replace(".q_proj.", f".{third}_proj.")) for third in "qkv"]
            renamed[name.replace(".q_proj.", ".in_proj_")] = torch.cat(thirds)
        return renamed


def _randomise(model: nn.Module) -> None:
    """Away from initialisation: there, sampling points lie on pixel centres, where bilinear gradients jump."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and not (".backbone." in name and tensor.dim() > 1):
                scale = 0.5 / math.sqrt(tensor[0].numel()) if tensor.dim() > 1 else 0.1
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * scale)


# ---------------------------------------------------------------- the losses, written out

Scalars = Sequence[Any]  # four floats, or four tensors without axes


def _giou(a: Scalars, b: Scalars) -> Any:
    """Generalised IoU of two boxes cxcywh."""
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    width, height = min(ax1, bx1) - max(ax0, bx0), min(ay1, by1) - max(ay0, by0)
    overlap = width * height if width > 0 and height > 0 else 0.0
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union - (hull - union) / hull


def _l1(a: Scalars, b: Scalars) -> Any:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def _assign(
    logits: Tensor, boxes: Tensor, labels: list[int], wanted: list[list[float]], *, focal: bool
) -> dict[int, int]:
    """Query -> object of one image."""
    cost = np.zeros((len(logits), len(labels)))
    for q, (row, box) in enumerate(zip(logits.tolist(), boxes.tolist(), strict=True)):
        for t, label in enumerate(labels):
            if focal:
                p = 1 / (1 + math.exp(-row[label]))
                of_class = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8) + 0.75 * p**2 * math.log(1 - p + 1e-8)
            else:
                of_class = -math.exp(row[label]) / sum(math.exp(x) for x in row)
            weight = 2 if focal else 1
            cost[q, t] = weight * of_class + 5 * _l1(box, wanted[t]) - 2 * _giou(box, wanted[t])
    return dict(zip(*(indices.tolist() for indices in linear_sum_assignment(cost)), strict=True))


def _layer_terms(
    logits: Tensor, boxes: Tensor, labels: list[list[int]], wanted: list[list[list[float]]], *, focal: bool
) -> list[Tensor]:
    """Class, L1 and GIoU loss of one layer."""
    num_boxes = max(sum(len(of_image) for of_image in labels), 1)
    of_class = l1 = giou = weights = logits.new_zeros(())
    for i in range(len(logits)):
        assigned = _assign(logits[i], boxes[i], labels[i], wanted[i], focal=focal)
        for q, row in enumerate(logits[i]):
            label = labels[i][assigned[q]] if q in assigned else CLASSES
            if focal:
                for k, x in enumerate(row):
                    p = 1 / (1 + torch.exp(-x))
                    loss = -0.25 * (1 - p) ** 2 * p.log() if k == label else -0.75 * p**2 * (1 - p).log()
                    of_class = of_class + loss / num_boxes
            else:
                weight = 0.1 if label == CLASSES else 1.0
                of_class = of_class + weight * (row.exp().sum().log() - row[label])
                weights = weights + weight
        for q, t in assigned.items():
            box = boxes[i, q].unbind()
            l1 = l1 + _l1(box, wanted[i][t]) / num_boxes
            giou = giou + (1 - _giou(box, wanted[i][t])) / num_boxes
    return [of_class if focal else of_class / weights, l1, giou]


def plain_losses(
    layers: list[tuple[Tensor, Tensor]], targets: list[Target], *, focal: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and terms of ``Oracle.layers``."""
    labels = [target.labels.tolist() for target in targets]
    wanted = [target.boxes_cxcywh.tolist() for target in targets]
    suffixes = ["", *(f"_{i}" for i in range(DECODER_LAYERS - 1)), "_enc"]
    terms: dict[str, Tensor] = {}
    total = layers[0][0].new_zeros(())
    for (logits, boxes), suffix in zip(layers, suffixes, strict=False):
        of_layer = [[0] * len(of_image) for of_image in labels] if suffix == "_enc" else labels
        values = _layer_terms(logits, boxes, of_layer, wanted, focal=focal)
        for name, weight, value in zip(("ce", "bbox", "giou"), (2 if focal else 1, 5, 2), values, strict=True):
            terms[f"loss_{name}{suffix}"] = value
            total = total + weight * value
    return total, terms


class PlainAdamW:
    """Clipping and decoupled weight decay, one parameter at a time, at the published rates."""

    def __init__(self, model: nn.Module, *, rate: float) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.rates = {
            name: rate / 10 if re.search("backbone|reference_points|sampling_offsets", name) else rate
            for name in self.parameters
        }
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        for name, gradient in gradients.items():
            g = gradient * min(1.0, 0.1 / (norm + 1e-6))
            self.first[name] = 0.9 * self.first[name] + 0.1 * g
            self.second[name] = 0.999 * self.second[name] + 0.001 * g**2
            mean, square = self.first[name] / (1 - 0.9**self.steps), self.second[name] / (1 - 0.999**self.steps)
            p = self.parameters[name]
            p -= self.rates[name] * (1e-4 * p + mean / (square.sqrt() + 1e-8))
            p.grad = None


# ---------------------------------------------------------------- the comparison


@dataclass
class Case:
    """One form: the oracle, our model with its weights, and a batch of two pictures of different size."""

    preset: str
    oracle: Oracle
    ours: DetectionModel
    batch: Batch

    @property
    def is_focal(self) -> bool:
        return self.preset != "detr-r50"

    def plain(self) -> tuple[Tensor, dict[str, Tensor]]:
        layers = self.oracle.layers(self.batch.pixels, self.batch.is_padding)
        return plain_losses(layers, self.batch.targets, focal=self.is_focal)


@pytest.fixture(scope="module", params=list(NAMED))
def case(request: pytest.FixtureRequest) -> Case:
    preset = request.param
    oracle = Oracle(preset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "resnet-parity", SPEC)
        ours = build_detector(get_preset(preset, **OURS)).double()
    wanted = ours.state_dict()
    given = oracle.under_our_names(oracle.model.state_dict())
    # Heads that all layers share are repeated in transformers' names; nothing else may be left over.
    assert not [n for n in given if n not in wanted and not re.match(r"(class|bbox)_embed\.1\.", n)]
    ours.load_state_dict({name: given[name] for name in wanted})
    return Case(preset, oracle, ours, _batch())


def _batch() -> Batch:
    """Two pictures of 64x96 and 56x72 on one canvas, with three objects and two."""
    generator = torch.Generator().manual_seed(11)
    pixels = torch.zeros(2, 3, 64, 96, dtype=torch.float64)
    is_padding = torch.ones(2, 64, 96, dtype=torch.bool)
    targets = []
    for i, (height, width, objects) in enumerate(((64, 96, 3), (56, 72, 2))):
        pixels[i, :, :height, :width] = torch.randn(3, height, width, generator=generator, dtype=torch.float64)
        is_padding[i, :height, :width] = False
        centres = torch.rand(objects, 2, generator=generator, dtype=torch.float64) * 0.4 + 0.3
        sizes = torch.rand(objects, 2, generator=generator, dtype=torch.float64) * 0.4 + 0.1
        labels = torch.randint(CLASSES, (objects,), generator=generator)
        targets.append(Target(labels, torch.cat([centres, sizes], dim=1)))
    return Batch(pixels, is_padding, targets)


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def test_the_total_and_every_loss_term_agree(case: Case) -> None:
    theirs_total, theirs = case.plain()
    total, terms = Criterion(case.ours.config.family)(
        case.ours.train()(case.batch.pixels, case.batch.is_padding), case.batch.targets
    )
    assert list(terms) == list(theirs)
    layers = DECODER_LAYERS + (case.preset == "r50-two-stage")
    assert len(terms) == 3 * layers
    errors = {name: _error(value, theirs[name]) for name, value in terms.items()}
    errors["total"] = _error(total, theirs_total)
    print(case.preset, {name: f"{error:.0e}" for name, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE


def test_the_gradients_of_every_parameter_agree(case: Case) -> None:
    case.oracle.model.zero_grad()
    case.ours.zero_grad()
    case.plain()[0].backward()
    output = case.ours.train()(case.batch.pixels, case.batch.is_padding)
    Criterion(case.ours.config.family)(output, case.batch.targets)[0].backward()
    theirs = case.oracle.under_our_names(
        {name: p.grad for name, p in case.oracle.model.named_parameters() if p.grad is not None}
    )
    ours = {name: p.grad for name, p in case.ours.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    named = {name: _error(ours[name], theirs[name]) for name in NAMED[case.preset]}
    print(case.preset, {name: f"{error:.0e}" for name, error in named.items()})
    assert max(named.values()) <= TOLERANCE
    whole = math.sqrt(sum(float(g.norm() ** 2) for g in theirs.values()))
    for name, gradient in theirs.items():
        # Relative to its own size, or to a millionth of the whole where it is nothing but rounding.
        assert float((ours[name] - gradient).norm()) <= TOLERANCE * max(float(gradient.norm()), 1e-6 * whole), name


def test_five_steps_of_the_trainer_agree(case: Case) -> None:
    oracle, ours = copy.deepcopy(case.oracle), copy.deepcopy(case.ours)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    moving = Case(case.preset, oracle, ours, case.batch)
    optimizer = PlainAdamW(oracle.model, rate=2e-4 if case.is_focal else 1e-4)
    theirs = []
    for _ in range(5):
        total, _ = moving.plain()
        total.backward()
        optimizer.step()
        theirs.append(total.item())

    recipe = paper_recipe(batch_size=32) if case.is_focal else detr_recipe(batch_size=16)
    trainer = Trainer(
        ours, Criterion(ours.config.family), recipe, parameter_groups(ours, recipe), torch.device("cpu")
    )
    trainer.train_mode()
    losses = [trainer.step([case.batch]).loss for _ in range(5)]
    print(case.preset, losses)
    assert losses == pytest.approx(theirs, rel=TOLERANCE)
    assert losses[-1] < 0.999 * losses[0]

    after = oracle.under_our_names(dict(oracle.model.named_parameters()))
    moved = dict(ours.named_parameters())
    errors = {name: _error(moved[name] - before[name], after[name] - before[name]) for name in NAMED[case.preset]}
    print({name: f"{error:.0e}" for name, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE
