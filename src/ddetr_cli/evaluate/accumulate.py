"""Precision and recall of matched detections: pycocotools' ``accumulate``, from the hits alone.

Between two hits precision only falls and recall stays, so the envelope of the curve, and every point of it that is
read off, is decided at the hits. The counts are integers and the divisions pycocotools' own, hence equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddetr_cli.evaluate.matching import IOU_THRESHOLDS, LIMITS, Matches

RECALLS = np.linspace(0.0, 1.0, 101)
_EPSILON = np.spacing(1)  # pycocotools adds it to the number of detections

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """``precision`` (T,R,K,A) at 101 recalls for 100 detections, ``recall`` (T,K,A,3) for 1, 10 and 100.

    Both are -1 where a class has no objects of a size. ``score`` (T,R,K,A) is the one that recall is reached at. The
    classes are in the order of the sorted category ids.
    """

    precision: Floats
    recall: Floats
    score: Floats


def accumulate(matches: Matches) -> Curves:
    """The curves of every class, size and threshold."""
    thresholds, recalls, limits = len(IOU_THRESHOLDS), len(RECALLS), len(LIMITS)
    classes, sizes = len(matches.classes), matches.is_outside.shape[1]
    precision = np.full((thresholds, recalls, classes, sizes), -1.0)
    score = np.full((thresholds, recalls, classes, sizes), -1.0)
    recall = np.full((thresholds, classes, sizes, limits), -1.0)
    counted = np.zeros((classes, sizes), dtype=np.int64)
    np.add.at(counted, matches.objects.category, ~matches.objects.is_ignored)
    ends = np.searchsorted(matches.candidate, matches.class_start)
    for k, category in enumerate(matches.classes):
        low, high = matches.class_start[k : k + 2]
        part = slice(ends[k], ends[k + 1])
        candidate = matches.candidate[part] - low
        rank = matches.rank[matches.candidate[part]]
        scores = matches.scores[low:high]
        is_hit, is_excused = matches.is_hit[part], matches.is_excused[part]
        for a in np.flatnonzero(counted[category]):
            is_outside = matches.is_outside[low:high, a]
            before = np.cumsum(~is_outside)  # of those that do not match
            for t in range(thresholds):
                hit, excused = is_hit[:, a, t], is_excused[:, a, t]
                for m, limit in enumerate(LIMITS):
                    recall[t, k, a, m] = np.count_nonzero(hit & (rank < limit)) / counted[category, a]
                # A hit counts whatever its own size, an excused match never.
                outside = is_outside[candidate]
                change = np.cumsum((hit & outside).astype(np.int64) - (excused & ~outside))
                places = candidate[hit]
                hits = np.arange(1, len(places) + 1, dtype=np.float64)
                total = (before[places] + change[hit]).astype(np.float64)
                curve = hits / (total + _EPSILON)
                envelope = np.maximum.accumulate(curve[::-1])[::-1]
                at = np.searchsorted(hits / counted[category, a], RECALLS, side="left")
                reached = at < len(places)
                precision[t, :, k, a] = np.where(reached, np.append(envelope, 0.0)[at], 0.0)
                score[t, :, k, a] = np.where(reached, np.append(scores[places], 0.0)[at], 0.0)
    return Curves(precision, recall, score)
