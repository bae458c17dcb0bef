"""Which detection found which object: COCO's greedy matching, for all classes, sizes and IoU thresholds at once.

The answers are those of pycocotools' ``evaluateImg`` to the last bit. Its loops run over every image, class, size and
threshold; here only detections that overlap an object of their class by half are looked at one after another, and
those of all images in the same step: first the best of every image and class, then the second best, and so on.
"""

# N detections of listed categories, M of them candidates, G ground-truth boxes, A sizes, T thresholds, P pairs.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.evaluate.table import DetectionTable, ranks

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
SIZES = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
LIMITS = (1, 10, 100)  # detections per image and class

Sizes = Mapping[str, tuple[float, float]]

_PAIRS = 1 << 20  # pairs of boxes compared at a time

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Objects:
    """The ground truth in columns: (G,) image and category are positions in its lists; ``is_ignored`` (G,A)."""

    image: Ints
    category: Ints
    boxes_xywh: NDArray[np.float64]
    is_crowd: Flags
    is_ignored: Flags


@dataclass(frozen=True)
class Matches:
    """Detections in the order they are scored in, and what each of them found.

    ``row`` (N,) is the detection's row in the table, sorted by class, score, image; ``class_start`` (K+1,) where
    each class begins, in the order of ``classes`` (positions in the ground truth's categories, by id). ``rank`` (N,)
    counts the detections of one image and class from 0; past 100 they are not among the N. ``is_outside`` (N,A):
    its own area is not of that size. ``candidate`` (M,), increasing, are those of the N that overlap an object
    enough to match it; ``found`` (M,T) is the object at size "all" or -1, ``is_hit`` and ``is_excused`` (M,A,T)
    whether it matched an object that counts, or one that does not (a crowd, or another size). ``past_limit`` counts
    what was left out as past 100.
    """

    objects: Objects
    image_rank: Ints
    classes: Ints
    class_start: Ints
    row: Ints
    image: Ints
    scores: NDArray[np.float64]
    rank: Ints
    is_outside: Flags
    candidate: Ints
    found: NDArray[np.int32]
    is_hit: Flags
    is_excused: Flags
    past_limit: int


def match(ground_truth: CocoAnnotations, table: DetectionTable, sizes: Sizes = SIZES) -> Matches:
    """The matches of a table of ``ground_truth``; detections of unlisted categories are left out.

    ``sizes`` are ranges of area in px², both ends within.
    """
    objects = columns(ground_truth, sizes)
    image_rank = ranks([image.id for image in ground_truth.images])
    class_rank = ranks([category.id for category in ground_truth.categories])
    images, classes = len(image_rank), len(class_rank)

    listed = np.flatnonzero(table.category < classes)
    image, kind = image_rank[table.image[listed]], class_rank[table.category[listed]]
    order = np.lexsort((image, -table.scores[listed], kind))
    group = kind[order] * images + image[order]
    rank = _rank_in(group)
    within = rank < LIMITS[-1]
    order, group, rank = order[within], group[within], rank[within]
    row, kind, image = listed[order], kind[order], image[order]
    del order, listed

    boxes = table.boxes_xywh[row]
    area = boxes[:, 2] * boxes[:, 3]
    of_objects = class_rank[objects.category] * images + image_rank[objects.image]
    detection, target, iou = overlapping(boxes, group, objects, of_objects, IOU_THRESHOLDS[0])
    candidate, which = np.unique(detection, return_inverse=True)
    found, is_hit, is_excused = _assign(which, target, iou, group[candidate], rank[candidate], objects)
    return Matches(
        objects,
        image_rank,
        np.argsort(class_rank),
        np.searchsorted(kind, np.arange(classes + 1)),
        row,
        image,
        table.scores[row],
        rank,
        np.stack([(area < low) | (area > high) for low, high in sizes.values()], axis=1),
        candidate,
        found,
        is_hit,
        is_excused,
        past_limit=int(np.count_nonzero(~within)),
    )


def columns(ground_truth: CocoAnnotations, sizes: Sizes = SIZES) -> Objects:
    """The annotations in columns, in their order."""
    image_at = {image.id: index for index, image in enumerate(ground_truth.images)}
    category_at = {category.id: index for index, category in enumerate(ground_truth.categories)}
    annotations = ground_truth.annotations
    area = np.array([a.area for a in annotations], dtype=np.float64)
    is_crowd = np.array([a.iscrowd for a in annotations], dtype=bool)
    return Objects(
        np.array([image_at[a.image_id] for a in annotations], dtype=np.int64),
        np.array([category_at[a.category_id] for a in annotations], dtype=np.int64),
        np.array([a.bbox_xywh for a in annotations], dtype=np.float64).reshape(-1, 4),
        is_crowd,
        np.stack([is_crowd | (area < low) | (area > high) for low, high in sizes.values()], axis=1),
    )


def _rank_in(group: Ints) -> Ints:
    """How many of the same group stand before each."""
    order = np.argsort(group, kind="stable")
    position = np.arange(len(group))
    starts = np.diff(group[order], prepend=-1) != 0
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = position - np.maximum.accumulate(np.where(starts, position, 0))
    return rank


def overlaps(
    boxes_xywh: NDArray[np.float64], others_xywh: NDArray[np.float64], is_crowd: Flags
) -> NDArray[np.float64]:
    """IoU of each box (P,4) with its other (P,4), in pycocotools' operations; over a crowd, of the box's own area."""
    x, y, w, h = boxes_xywh.T
    u, v, s, t = others_xywh.T
    wide = np.minimum(w + x, s + u) - np.maximum(x, u)
    high = np.minimum(h + y, t + v) - np.maximum(y, v)
    shared = wide * high
    whole = w * h
    # Boxes of 1e-200 px, whose area is 0, overlap by 0/0: not at all, as all that is not a number.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        iou = shared / np.where(is_crowd, whole, whole + s * t - shared)
    return np.where((wide > 0) & (shared > 0), iou, 0.0)


def overlapping(
    boxes: NDArray[np.float64], group: Ints, objects: Objects, of_objects: Ints, least: float
) -> tuple[Ints, Ints, NDArray[np.float64]]:
    """(detection, object, IoU) of all pairs of one group, as ``of_objects`` (G,) says, that overlap by ``least``."""
    by_group = np.argsort(of_objects, kind="stable")
    in_order = of_objects[by_group]
    first = np.searchsorted(in_order, group, side="left")
    count = np.searchsorted(in_order, group, side="right") - first
    with_objects = np.flatnonzero(count)
    found: list[tuple[Ints, Ints, NDArray[np.float64]]] = []
    for part in _parts(with_objects, count):
        times = count[part]
        detection = np.repeat(part, times)
        steps = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        target = by_group[np.repeat(first[part], times) + steps]
        iou = overlaps(boxes[detection], objects.boxes_xywh[target], objects.is_crowd[target])
        enough = iou >= least
        found.append((detection[enough], target[enough], iou[enough]))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    detections, targets, ious = (np.concatenate(column) for column in zip(*found, strict=True))
    return detections, targets, ious


def _parts(chosen: Ints, count: Ints) -> Iterator[Ints]:
    """``chosen`` cut so that the counts of each part sum to about ``_PAIRS``."""
    total = np.cumsum(count[chosen])
    if len(chosen):
        yield from np.split(chosen, np.searchsorted(total, np.arange(_PAIRS, total[-1], _PAIRS)))


def _assign(
    which: Ints, target: Ints, iou: NDArray[np.float64], group: Ints, rank: Ints, objects: Objects
) -> tuple[NDArray[np.int32], Flags, Flags]:
    """What each candidate finds, best first within its group: objects that count before others, the nearest first.

    ``which`` (P,) is the candidate of each pair; of two objects equally near the later one is taken.
    """
    candidates, sizes, thresholds = len(group), objects.is_ignored.shape[1], len(IOU_THRESHOLDS)
    found = np.full((candidates, thresholds), -1, dtype=np.int32)
    is_hit = np.zeros((candidates, sizes, thresholds), dtype=bool)
    is_excused = np.zeros((candidates, sizes, thresholds), dtype=bool)
    is_taken = np.zeros((len(objects.image), sizes, thresholds), dtype=bool)
    # Candidates in the order of their turn: all that come first in their image and class, then all second ones.
    by_rank = np.lexsort((rank, group))
    turn = np.empty(candidates, dtype=np.int64)
    turn[by_rank] = _rank_in(group[by_rank])
    order = np.lexsort((-target, -iou, which, turn[which]))
    which, target, iou = which[order], target[order], iou[order]
    reaches = iou[:, None] >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    ends = np.searchsorted(turn[which], np.arange(turn.max(initial=-1) + 2))
    for start, end in pairwise(ends.tolist()):
        objects_now = target[start:end]
        is_free = ~is_taken[objects_now] | objects.is_crowd[objects_now, None, None]
        is_possible = is_free & reaches[start:end, None, :]
        # Position among the pairs of this turn; one that does not count comes after all that do.
        pairs = end - start
        preference = np.arange(pairs, dtype=np.int32)[:, None] + np.int32(pairs) * objects.is_ignored[objects_now]
        preference = np.where(is_possible, preference[:, :, None], np.int32(2 * pairs))
        starts = np.flatnonzero(np.diff(which[start:end], prepend=-1))
        best = np.minimum.reduceat(preference, starts, axis=0)
        now = which[start:end][starts]
        is_hit[now] = best < pairs
        is_excused[now] = (best >= pairs) & (best < 2 * pairs)
        taken = objects_now[best % pairs]
        owner, size, threshold = np.nonzero(best < 2 * pairs)
        is_taken[taken[owner, size, threshold], size, threshold] = True
        found[now] = np.where(best[:, 0] < 2 * pairs, taken[:, 0], -1)
    return found, is_hit, is_excused
