"""How big a model is: parameters, and multiply-adds of one picture, counted on shapes without computing.

Convention: one multiply-add is one FLOP, as in the papers' tables. Convolutions, matrix products, attention and the
deformable op are counted; norms, activations, softmax and additions are not. Counted is what runs: in the DETR
families the heads of the last decoder layer alone (refining models: also the box heads between layers), which makes
up to 0.3 % less than the authors' code, whose inference computes the heads of all six. In Faster R-CNN the pyramid
is padded to multiples of 32, and the second stage, whose work depends on the picture, is counted for all the
proposals it may get; suppression is not counted.
"""

# B batch, Q queries, M heads, L levels, P points, D channels per head, N proposals, C channels

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ddetr_cli.ops import msda  # noqa: F401  (defines the op that is counted)
from ddetr_cli.presets import FASTER_RCNN

if TYPE_CHECKING:
    from ddetr_cli.model.detector import DetectionModel
    from ddetr_cli.model.faster_rcnn import FasterRcnn

FLOPS_CONVENTION = (
    "one multiply-add is one FLOP; convolutions, matrix products, attention, deformable sampling and RoIAlign of one "
    "picture; heads of the last decoder layer; Faster R-CNN with 1000 proposals, without suppression"
)

# Per sampled value: four corners of the bilinear sum, and for the deformable op the attention weight.
MULTIPLY_ADDS_PER_SAMPLE = 5
_CORNERS = 4

_KINDS = {"convolution": "convolution", "mm": "linear", "scaled_dot_product": "attention", "msda": "deformable"}


@dataclass(frozen=True)
class ModelSize:
    """What a model weighs: parameters (as the authors count, without buffers) and FLOPs by kind of operation."""

    parameters: int
    trainable_parameters: int
    flops_by_operation: dict[str, int]

    @property
    def flops(self) -> int:
        """All multiply-adds of the pass."""
        return sum(self.flops_by_operation.values())


def measure_size(model: DetectionModel, size_hw: tuple[int, int]) -> ModelSize:
    """Parameters of ``model``, and FLOPs of one forward pass over one picture of ``size_hw`` (h, w)."""
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ModelSize(
        parameters=sum(count for count, _ in parameters),
        trainable_parameters=sum(count for count, is_trained in parameters if is_trained),
        flops_by_operation=count_flops(model, size_hw),
    )


def count_flops(model: DetectionModel, size_hw: tuple[int, int]) -> dict[str, int]:
    """Multiply-adds of one forward pass over one picture of ``size_hw`` (h, w), by kind of operation."""
    run: Callable[[Any, torch.Tensor], None] = _forward
    extra = {}
    if model.config.family == FASTER_RCNN:
        run, extra = _faster_rcnn_forward, {"roi_align": _roi_align_flops(cast("FasterRcnn", model))}
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.ddetr.msda: _msda_flops})
    # Fake tensors have shapes and no numbers: a second instead of a forward pass, and no memory. The counter follows
    # gradients, so they must be on.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), counter:
        run(model, torch.zeros(1, 3, *size_hw))
    flops: dict[str, int] = dict.fromkeys(_KINDS.values(), 0)
    for operation, count in counter.get_flop_counts()["Global"].items():
        kind = next(kind for part, kind in _KINDS.items() if part in str(operation))
        flops[kind] += int(count) // 2  # PyTorch counts a multiply-add as two
    return flops | extra


def mean_flops(model: DetectionModel, sizes_hw: Iterable[tuple[int, int]]) -> float:
    """Multiply-adds of a picture, averaged over pictures the model sees at ``sizes_hw`` (h, w)."""
    sizes = list(sizes_hw)
    by_size = {size_hw: sum(count_flops(model, size_hw).values()) for size_hw in set(sizes)}
    return sum(by_size[size_hw] for size_hw in sizes) / len(sizes)


def _forward(model: nn.Module, pixels: torch.Tensor) -> None:
    model(pixels, None)


def _faster_rcnn_forward(model: FasterRcnn, pixels: torch.Tensor) -> None:
    """All of it that does not depend on the picture, and the second stage on as many proposals as it may get."""
    from ddetr_cli.model.faster_rcnn import PYRAMID_STRIDE

    height, width = pixels.shape[-2:]
    maps = list(model.backbone(F.pad(pixels, (0, -width % PYRAMID_STRIDE, 0, -height % PYRAMID_STRIDE))).values())
    model.rpn.head(maps)
    side = model.roi_heads.box_roi_pool.output_size[0]
    regions = pixels.new_zeros(model.rpn.post_nms_top_n(), maps[0].shape[1], side, side)
    model.roi_heads.box_predictor(model.roi_heads.box_head(regions))


def _roi_align_flops(model: FasterRcnn) -> int:
    pool = model.roi_heads.box_roi_pool
    samples = pool.output_size[0] * pool.output_size[1] * pool.sampling_ratio**2
    return int(model.rpn.post_nms_top_n() * model.backbone.out_channels * samples * _CORNERS)


def _msda_flops(
    value: Sequence[int], _level_hw: Sequence[int], _sampling_xy: Sequence[int], weights: Sequence[int], **_: Any
) -> int:
    """PyTorch's count (two per multiply-add) of the op, from the shapes of its arguments."""
    B, Q, M, L, P = weights
    return 2 * MULTIPLY_ADDS_PER_SAMPLE * B * Q * M * L * P * value[-1]
