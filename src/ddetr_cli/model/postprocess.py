"""From a model's output to scored boxes in pixels, as each family's authors do it.

# B batch, Q queries, K classes, N kept detections
None of the DETR families applies a threshold, suppresses duplicates or clips boxes to the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddetr_cli.boxes import cxcywh_to_xyxy
from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.presets import DETR
from ddetr_cli.transfer import upload

if TYPE_CHECKING:
    from ddetr_cli.model.faster_rcnn import SuppressedOutput

Sizes = Sequence[tuple[int, int]] | Tensor


@dataclass(frozen=True)
class Detections:
    """One image's N detections, best first: scores (N,), labels (N,) class indices, boxes (N,4) px."""

    scores: Tensor
    labels: Tensor
    boxes_xyxy_px: Tensor


def decode(
    family: str, output: DetectorOutput | SuppressedOutput, sizes_hw: Sequence[tuple[int, int]]
) -> list[Detections]:
    """Detections on the CPU in float32, from what a model of ``family`` returned for images of these (h, w)."""
    if isinstance(output, DetectorOutput):
        choose = postprocess_softmax if family == DETR else postprocess
        rows = choose(output.logits.float(), output.boxes_cxcywh.float(), sizes_hw)
        return rows if output.logits.device.type == "cpu" else copy_at_once(rows)
    boxes = [
        _to_pixels(relative.float().cpu()[None], [size_hw])[0]
        for relative, size_hw in zip(output.boxes_xyxy, sizes_hw, strict=True)
    ]
    scores, labels = [row.float().cpu() for row in output.scores], [row.cpu() for row in output.labels]
    return [Detections(*image) for image in zip(scores, labels, boxes, strict=True)]


def copy_at_once(rows: Sequence[Detections]) -> list[Detections]:
    """``rows``, as many in every image, on the CPU by one copy: every copy from a GPU waits for all of its work."""
    columns = [torch.cat([r.scores[:, None], r.labels[:, None].float(), r.boxes_xyxy_px], dim=1) for r in rows]
    return [Detections(image[:, 0], image[:, 1].long(), image[:, 2:]) for image in torch.stack(columns).cpu()]


def postprocess(logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Sizes, top: int = 100) -> list[Detections]:
    """Deformable DETR: the ``min(top, Q*K)`` best (query, class) pairs of each image, boxes scaled to its size.

    logits (B,Q,K), boxes_cxcywh (B,Q,4) in [0,1], sizes_hw B original (height, width). One query can appear with
    several labels. Source: its authors' PostProcess.
    """
    _, Q, K = logits.shape
    scores, best = logits.sigmoid().flatten(1).topk(min(top, Q * K), dim=1)
    boxes = cxcywh_to_xyxy(boxes_cxcywh).gather(1, (best // K)[..., None].expand(-1, -1, 4))
    return [Detections(*image) for image in zip(scores, best % K, _to_pixels(boxes, sizes_hw), strict=True)]


def postprocess_softmax(logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Sizes) -> list[Detections]:
    """DETR: every query once, with its likeliest class other than "no object", the last of logits (B,Q,K+1).

    The rest as in ``postprocess``. Source: its authors' PostProcess, whose rows stay in the order of the queries.
    """
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    boxes = cxcywh_to_xyxy(boxes_cxcywh).gather(1, order[..., None].expand(-1, -1, 4))
    rows = zip(scores, labels.gather(1, order), _to_pixels(boxes, sizes_hw), strict=True)
    return [Detections(*image) for image in rows]


def _to_pixels(boxes: Tensor, sizes_hw: Sizes) -> Tensor:
    """Boxes (B,N,4) xyxy in [0,1], in pixels of images of these sizes."""
    whwh = torch.as_tensor(sizes_hw, dtype=boxes.dtype).flip(-1).repeat(1, 2)
    return boxes * upload(whwh, boxes.device)[:, None]
