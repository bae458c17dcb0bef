"""How far the twelve numbers may be off by the choice of pictures: intervals from drawing the images again.

Nothing is matched again. An image drawn twice counts its detections and objects twice, so a sample is a weight for
each image, and its numbers are sums over the hits that are known already.
"""

# N detections, H hits: (candidate, size, threshold); a segment is one (class, size, threshold).

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ddetr_cli.evaluate.accumulate import RECALLS
from ddetr_cli.evaluate.matching import IOU_THRESHOLDS, LIMITS, SIZES, Matches
from ddetr_cli.evaluate.metrics import DEFINITIONS, Interval

SEED = 0
_COVERED = (2.5, 97.5)  # percentiles of a 95 % interval


def intervals(
    matches: Matches, images: int, samples: int, *, on_sample: Callable[[], object] = lambda: None
) -> dict[str, Interval | None]:
    """The 95 % interval of each of the twelve numbers over ``samples`` draws of ``images`` images; always the same.

    None for a number that no draw has (nothing of that size in the data).
    """
    numbers = Resampling(matches)
    random = np.random.default_rng(SEED)
    draws = []
    for _ in range(samples):
        draws.append(numbers.of(np.bincount(random.integers(0, images, images), minlength=images)))
        on_sample()
    return spread(np.array(draws))


def spread(draws: NDArray[np.float64]) -> dict[str, Interval | None]:
    """The 95 % interval of each of the twelve numbers over draws (samples,12); None for one that no draw has."""
    found: dict[str, Interval | None] = {}
    for name, column in zip(DEFINITIONS, draws.T, strict=True):
        present = column[~np.isnan(column)]
        low, high = np.percentile(present, _COVERED).tolist() if present.size else (0.0, 0.0)
        found[name] = (low, high) if present.size else None
    return found


class Resampling:
    """The twelve numbers of a data set in which each image occurs so many times."""

    def __init__(self, matches: Matches) -> None:
        self._matches = matches
        sizes, thresholds = len(SIZES), len(IOU_THRESHOLDS)
        self._shape = (len(matches.classes), sizes, thresholds)
        self._segments = int(np.prod(self._shape))
        self._class_rank = np.argsort(matches.classes)
        kind = np.searchsorted(matches.class_start, matches.candidate, side="right") - 1

        def in_order(chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            """(segment, candidate) of all that are chosen, segment by segment."""
            candidate, size, threshold = np.nonzero(chosen)
            segment = np.ravel_multi_index((kind[candidate], size, threshold), self._shape)
            order = np.argsort(segment, kind="stable")
            return segment[order], candidate[order]

        self._segment, hit = in_order(matches.is_hit)
        place = matches.candidate[hit]
        size = self._segment // thresholds % sizes
        self._image = matches.image[place]
        self._start = np.searchsorted(self._segment, self._segment)
        self._ends = np.searchsorted(self._segment, np.arange(self._segments + 1))
        self._offset = 2.0 * (self._segments - self._segment)
        self._among_best = {
            limit: np.flatnonzero((matches.rank[place] < limit) & (size == 0))
            for limit in LIMITS
            if limit < LIMITS[-1]
        }
        # Where a hit, and the first detection of its class, stand in the running sums of all sizes.
        row = size * (len(matches.row) + 1)
        self._place = row + place + 1
        self._class_start = row + matches.class_start[self._segment // (sizes * thresholds)]
        # A hit counts whatever its own size, and what is excused does not: where that differs from those sums.
        outside = matches.is_outside[matches.candidate][:, :, None]
        hit_outside, excused_inside = matches.is_hit & outside, matches.is_excused & ~outside
        segment, changed = in_order(hit_outside | excused_inside)
        self._changed = matches.image[matches.candidate[changed]]
        self._change = np.where(hit_outside[changed, segment // thresholds % sizes, segment % thresholds], 1, -1)
        self._change_start = np.searchsorted(segment, self._segment)
        key = len(kind)
        self._change_end = np.searchsorted(segment * key + changed, self._segment * key + hit, side="right")

    def of(self, times: NDArray[np.int64]) -> list[float]:
        """The numbers where the image of rank i occurs ``times[i]`` times; NaN where there is nothing to measure."""
        counted = np.repeat(self._objects(times).reshape(-1), len(IOU_THRESHOLDS))
        weight = times[self._image]
        running = _running(weight)
        hits = running[1:] - running[self._start]
        absent = np.where(counted == 0, np.nan, 1.0)
        precision = (self._areas(times, hits, counted) * absent).reshape(self._shape)
        recall = {}
        for limit in LIMITS:
            if limit in self._among_best:
                best = self._among_best[limit]
                found = np.bincount(self._segment[best], weight[best], self._segments)
            else:
                found = np.diff(running[self._ends])
            recall[limit] = (found / np.maximum(counted, 1) * absent).reshape(self._shape)
        numbers = []
        for is_precision, iou, size, limit in DEFINITIONS.values():
            values = (precision if is_precision else recall[limit])[:, list(SIZES).index(size)]
            if iou is not None:
                values = values[:, np.isclose(IOU_THRESHOLDS, iou)]
            present = values[~np.isnan(values)]
            numbers.append(float(present.mean()) if present.size else float("nan"))
        return numbers

    def _objects(self, times: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many objects count for each class and size, (K,A)."""
        objects = self._matches.objects
        counted = np.zeros(self._shape[:2], dtype=np.int64)
        weight = times[self._matches.image_rank[objects.image]]
        np.add.at(counted, self._class_rank[objects.category], ~objects.is_ignored * weight[:, None])
        return counted

    def _areas(
        self, times: NDArray[np.int64], hits: NDArray[np.int64], counted: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """The mean precision of each segment over the 101 recalls, where ``hits`` (H,) are those up to each."""
        weight = times[self._matches.image]
        inside = np.concatenate([_running(weight * ~outside) for outside in self._matches.is_outside.T])
        change = _running(self._change * times[self._changed])
        total = inside[self._place] - inside[self._class_start]
        total += change[self._change_end] - change[self._change_start]
        # Later segments are below earlier ones, so one pass from the end makes the envelope of each.
        curve = hits / np.maximum(total, 1) + self._offset
        envelope = np.maximum.accumulate(curve[::-1])[::-1] - self._offset
        reached = np.searchsorted(RECALLS, hits / np.maximum(counted, 1)[self._segment], side="right")
        new = np.diff(reached, prepend=0)
        is_first = self._start == np.arange(len(self._start))
        new[is_first] = reached[is_first]
        return np.bincount(self._segment, new * envelope, self._segments) / len(RECALLS)


def _running(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sums of the first 0, 1, 2 ... values."""
    return np.concatenate([[0], np.cumsum(values)])
