"""What was wrong with each detection that found nothing, and what each kind of mistake costs in AP50.

The kinds and their order are those of TIDE (Bolya, Foley, Hays, Hoffman: "TIDE: A General Toolbox for Identifying
Object Detection Errors", 2020, arXiv:2008.08115): the overlap with objects of the same and of other classes decides;
from 0.5 on an object is met, below 0.1 it is background. What a kind costs is the AP50 gained by mending it alone.
"""

# N detections as in Matches, G objects, K classes.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddetr_cli.evaluate.accumulate import RECALLS
from ddetr_cli.evaluate.matching import Flags, Ints, Matches, overlapping
from ddetr_cli.evaluate.table import DetectionTable

MET, BACKGROUND = 0.5, 0.1

# What a detection can be: a hit, a match that does not count (a crowd), or one of these.
KINDS = ("localisation", "class", "duplicate", "background", "both")
MISSED = "missed"
HIT, EXCUSED = -1, -2
MEANINGS = {
    "localisation": "right class, but the box overlaps the object by 0.1 to 0.5 only",
    "class": "the box fits an object of another class",
    "duplicate": "the object was found already, by a better score",
    "background": "nothing there: no object overlaps by 0.1",
    "both": "another class, and the box overlaps by 0.1 to 0.5 only",
    MISSED: "an object that no detection is near, or only as a duplicate or of a wrong class and box",
}


@dataclass(frozen=True)
class Mistakes:
    """``kind`` (N,): position in KINDS, HIT or EXCUSED; ``target`` (N,) the object a hit or mistake is about, or -1.

    ``label`` (N,) and ``truth`` (G,) are classes by rank of their id, ``place`` (G,) the rank of the image.
    ``is_missed`` (G,) as MISSED says. ``ap50`` is the whole, ``cost`` what mending each kind would add.
    """

    kind: NDArray[np.int8]
    target: Ints
    label: Ints
    truth: Ints
    place: Ints
    is_missed: Flags
    ap50: float
    cost: dict[str, float]


def find_mistakes(matches: Matches, table: DetectionTable) -> Mistakes:
    """The mistakes among the matches of ``table``, at IoU 0.5."""
    objects = matches.objects
    count = len(matches.row)
    label = np.searchsorted(matches.class_start, np.arange(count), side="right") - 1
    truth = np.argsort(matches.classes)[objects.category]
    place = matches.image_rank[objects.image]
    kind = np.full(count, KINDS.index("background"), dtype=np.int8)
    target = np.full(count, -1, dtype=np.int64)
    target[matches.candidate] = matches.found[:, 0]
    kind[matches.is_outside[:, 0]] = EXCUSED  # larger than COCO's largest; a hit all the same
    kind[matches.candidate[matches.is_hit[:, 0, 0]]] = HIT
    kind[matches.candidate[matches.is_excused[:, 0, 0]]] = EXCUSED

    detection, other, iou = overlapping(table.boxes_xywh[matches.row], matches.image, objects, place, BACKGROUND)
    wrong = (kind[detection] >= 0) & ~objects.is_ignored[other, 0]
    detection, other, iou = detection[wrong], other[wrong], iou[wrong]
    is_same = label[detection] == truth[other]
    same, same_iou = _nearest(detection[is_same], other[is_same], iou[is_same], count)
    alien, alien_iou = _nearest(detection[~is_same], other[~is_same], iou[~is_same], count)
    is_wrong = kind >= 0
    rules = (
        ("localisation", (same_iou >= BACKGROUND) & (same_iou < MET), same),
        ("class", alien_iou >= MET, alien),
        ("duplicate", same_iou >= MET, same),
        ("both", alien_iou >= BACKGROUND, alien),
    )
    is_open = is_wrong.copy()
    for name, applies, about in rules:
        chosen = is_open & applies
        kind[chosen], target[chosen] = KINDS.index(name), about[chosen]
        is_open &= ~applies
    target[is_open] = -1

    found = np.zeros(len(truth), dtype=bool)
    found[target[kind == HIT]] = True
    near = np.isin(kind, (KINDS.index("localisation"), KINDS.index("class")))
    approached = np.zeros(len(truth), dtype=bool)
    approached[target[near]] = True
    is_missed = ~objects.is_ignored[:, 0] & ~found & ~approached
    ap50, cost = _costs(matches, kind, target, label, truth, found, is_missed)
    return Mistakes(kind, target, label, truth, place, is_missed, ap50, cost)


def _nearest(detection: Ints, other: Ints, iou: NDArray[np.float64], count: int) -> tuple[Ints, NDArray[np.float64]]:
    """For each of ``count`` detections the object that overlaps it most, and by how much; -1 and 0 without one."""
    order = np.lexsort((iou, detection))
    last = order[np.diff(detection[order], append=-1) != 0]
    nearest, most = np.full(count, -1, dtype=np.int64), np.zeros(count)
    nearest[detection[last]], most[detection[last]] = other[last], iou[last]
    return nearest, most


def _costs(
    matches: Matches, kind: NDArray[np.int8], target: Ints, label: Ints, truth: Ints, found: Flags, is_missed: Flags
) -> tuple[float, dict[str, float]]:
    classes = len(matches.classes)
    counts = np.bincount(truth[~matches.objects.is_ignored[:, 0]], minlength=classes)
    scores, is_hit = matches.scores, kind == HIT
    counted = kind != EXCUSED

    def ap50(kept: Flags, hit: Flags, labels: Ints, positives: Ints) -> float:
        return _ap50(labels[kept], scores[kept], hit[kept], positives)

    base = ap50(counted, is_hit, label, counts)
    cost: dict[str, float] = {}
    for index, name in enumerate(KINDS):
        chosen = kind == index
        mended = np.zeros(len(kind), dtype=bool)
        labels = label.copy()
        if name in ("localisation", "class"):
            # Each object that nothing has found is now found, by the best of those that were near it.
            rows = np.flatnonzero(chosen)
            rows = rows[~found[target[rows]]]
            order = rows[np.lexsort((-scores[rows], target[rows]))]
            mended[order[np.diff(target[order], prepend=-1) != 0]] = True
            labels[mended] = truth[target[mended]]
        cost[name] = ap50(counted & (~chosen | mended), is_hit | mended, labels, counts) - base
    fewer = counts - np.bincount(truth[is_missed], minlength=classes)
    cost[MISSED] = ap50(counted, is_hit, label, fewer) - base
    return base, cost


def _ap50(label: Ints, scores: NDArray[np.float64], is_hit: Flags, counts: Ints) -> float:
    """The mean over the classes that have objects of the precision at 101 recalls."""
    order = np.lexsort((-scores, label))
    label, is_hit = label[order], is_hit[order]
    starts = np.searchsorted(label, np.arange(len(counts) + 1))
    areas = []
    for k in np.flatnonzero(counts):
        places = np.flatnonzero(is_hit[starts[k] : starts[k + 1]])
        hits = np.arange(1, len(places) + 1)
        envelope = np.maximum.accumulate((hits / (places + 1))[::-1])[::-1]
        at = np.searchsorted(hits / counts[k], RECALLS)
        areas.append(np.append(envelope, 0.0)[np.minimum(at, len(places))].mean())
    return float(np.mean(areas)) if areas else 0.0


@dataclass(frozen=True)
class Verdicts:
    """What a user who keeps detections from a score on gets: ``threshold``, the score of the best F1, and ``f1``.

    ``confusion`` (K+1,K+1): rows what is there, columns what was said, both with "nothing" last. ``kept`` (N,) the
    detections from the threshold on; ``is_found`` (G,) the objects hit by one of those.
    """

    threshold: float
    f1: float
    precision: float
    recall: float
    confusion: Ints
    kept: Flags
    is_found: Flags


def judge(matches: Matches, mistakes: Mistakes) -> Verdicts:
    """The verdicts at the score that gives the best F1 over all classes together."""
    counted = mistakes.kind != EXCUSED
    positives = int(np.count_nonzero(~matches.objects.is_ignored[:, 0]))
    order = np.flatnonzero(counted)[np.argsort(-matches.scores[counted], kind="stable")]
    hits = np.cumsum(mistakes.kind[order] == HIT)
    if len(order):
        f1 = 2 * hits / (np.arange(1, len(order) + 1) + positives)
        threshold = float(matches.scores[order[np.argmax(f1)]])
    else:
        threshold = 1.0
    kept = counted & (matches.scores >= threshold)
    is_hit = kept & (mistakes.kind == HIT)
    is_found = np.zeros(len(mistakes.truth), dtype=bool)
    is_found[mistakes.target[is_hit]] = True
    nothing = len(matches.classes)
    confusion = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)
    np.add.at(confusion, (mistakes.truth[mistakes.target[is_hit]], mistakes.label[is_hit]), 1)
    # An object under a wrong name, once; then what is left on either side.
    rows = np.flatnonzero(kept & (mistakes.kind == KINDS.index("class")))
    rows = rows[~is_found[mistakes.target[rows]]]
    rows = rows[np.lexsort((-matches.scores[rows], mistakes.target[rows]))]
    named = rows[np.diff(mistakes.target[rows], prepend=-1) != 0]
    np.add.at(confusion, (mistakes.truth[mistakes.target[named]], mistakes.label[named]), 1)
    rest = kept & ~is_hit
    rest[named] = False
    confusion[nothing, :nothing] = np.bincount(mistakes.label[rest], minlength=nothing)
    unseen = ~is_found & ~matches.objects.is_ignored[:, 0]
    unseen[mistakes.target[named]] = False
    confusion[:nothing, nothing] = np.bincount(mistakes.truth[unseen], minlength=nothing)
    right, said = int(np.count_nonzero(is_hit)), int(np.count_nonzero(kept))
    return Verdicts(
        threshold,
        2 * right / max(said + positives, 1),
        right / max(said, 1),
        right / max(positives, 1),
        confusion,
        kept,
        is_found,
    )
