"""What the twelve numbers do not say: how far scores can be believed, and how AP depends on the size of objects."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.evaluate.accumulate import accumulate
from ddetr_cli.evaluate.matching import Matches, match
from ddetr_cli.evaluate.mistakes import EXCUSED, HIT, Mistakes
from ddetr_cli.evaluate.table import DetectionTable

# Sides in px: COCO's borders between small, medium and large, and the octaves around them.
SIDES = (0, 16, 32, 64, 96, 192, 384, 1e5)


@dataclass(frozen=True)
class Calibration:
    """Ten bins of scores: ``score`` their mean, ``right`` the share of hits at IoU 0.5 (NaN where empty), ``count``.

    ``error`` is the mean distance of the two, each bin weighing as its detections: the expected calibration error
    (Guo et al. 2017, arXiv:1706.04599).
    """

    score: NDArray[np.float64]
    right: NDArray[np.float64]
    count: NDArray[np.int64]
    error: float


def calibrate(matches: Matches, mistakes: Mistakes, bins: int = 10) -> Calibration:
    """How often detections of a score are right. Scores outside 0 to 1 fall into the first or the last bin."""
    counted = mistakes.kind != EXCUSED
    scores, is_hit = matches.scores[counted], mistakes.kind[counted] == HIT
    index = np.clip((scores * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        score = np.bincount(index, scores, bins) / count
        right = np.bincount(index, is_hit, bins) / count
    error = np.nansum(np.abs(score - right) * count) / max(count.sum(), 1)
    return Calibration(score, right, count, float(error))


@dataclass(frozen=True)
class SizeBin:
    """AP and AP50 of the objects whose area is that of a square with sides from ``low`` to ``high`` px."""

    low: float
    high: float
    objects: int
    ap: float
    ap50: float

    @property
    def label(self) -> str:
        """The range in words."""
        if self.low == 0:
            return f"< {self.high:.0f}"
        return f"≥ {self.low:.0f}" if self.high >= SIDES[-1] else f"{self.low:.0f}-{self.high:.0f}"


def by_size(ground_truth: CocoAnnotations, table: DetectionTable) -> list[SizeBin]:
    """One bin for each range of sizes that has objects; the objects of others are ignored, as COCO's APs does it."""
    ranges = list(pairwise(SIDES))
    matches = match(ground_truth, table, {f"{low}": (low**2, high**2) for low, high in ranges})
    precision = accumulate(matches).precision
    found = []
    for index, (low, high) in enumerate(ranges):
        counted = int(np.count_nonzero(~matches.objects.is_ignored[:, index]))
        if counted:
            values = precision[..., index]
            ap = float(values[values > -1].mean())
            found.append(SizeBin(low, high, counted, ap, float(values[0][values[0] > -1].mean())))
    return found
