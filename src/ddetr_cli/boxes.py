"""Boxes: conversions, areas, IoU and generalised IoU.

# N, M numbers of boxes; the last axis holds the four coordinates; axes before those of N and M broadcast
Formats: ``cxcywh`` centre and size, ``xyxy`` two corners, ``xywh`` corner and size (COCO's). The unit is the
caller's: pixels or fractions of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners (..., 4) of boxes (..., 4) given as centre and size."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Centre and size (..., 4) of boxes (..., 4) given as corners."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """COCO's corner and size (..., 4) of boxes (..., 4) given as corners."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack((x0, y0, x1 - x0, y1 - y0), dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    """Areas (...) of boxes (..., 4)."""
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def iou(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union area of every pair, (...,N,M), of boxes (...,N,4) and (...,M,4). 0/0 is NaN, as the authors'."""
    top_left = torch.maximum(a_xyxy[..., :, None, :2], b_xyxy[..., None, :, :2])
    bottom_right = torch.minimum(a_xyxy[..., :, None, 2:], b_xyxy[..., None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    union = area(a_xyxy)[..., :, None] + area(b_xyxy)[..., None, :] - intersection
    return intersection / union, union


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU (...,N,M) in [-1,1] of boxes (...,N,4) and (...,M,4). Source: arXiv:1902.09630."""
    pair_iou, union = iou(a_xyxy, b_xyxy)
    top_left = torch.minimum(a_xyxy[..., :, None, :2], b_xyxy[..., None, :, :2])
    bottom_right = torch.maximum(a_xyxy[..., :, None, 2:], b_xyxy[..., None, :, 2:])
    hull = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    return pair_iou - (hull - union) / hull
