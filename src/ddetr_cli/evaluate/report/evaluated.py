"""One evaluation with all that a report says of it, each part worked out when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ddetr_cli.data.records import CocoAnnotations
from ddetr_cli.evaluate.accumulate import Curves, accumulate
from ddetr_cli.evaluate.matching import Ints, Matches, match
from ddetr_cli.evaluate.metrics import CocoMetrics, metrics_of, unique_labels
from ddetr_cli.evaluate.mistakes import Mistakes, Verdicts, find_mistakes, judge
from ddetr_cli.evaluate.table import DetectionTable


@dataclass(frozen=True)
class Evaluated:
    """``name`` is the model or results file; ``images`` the folder of the pictures, None where there is none.

    Classes are in the order of their ids, as in Matches.
    """

    name: str
    ground_truth: CocoAnnotations
    images: Path | None
    table: DetectionTable
    matches: Matches
    curves: Curves
    metrics: CocoMetrics

    @cached_property
    def mistakes(self) -> Mistakes:
        """What was wrong with each detection."""
        return find_mistakes(self.matches, self.table)

    @cached_property
    def verdicts(self) -> Verdicts:
        """What is right and wrong at the score of the best F1."""
        return judge(self.matches, self.mistakes)

    @cached_property
    def class_names(self) -> list[str]:
        """The name of each class, with its id where several have it."""
        labels = unique_labels(self.ground_truth.categories)
        return [labels[self.ground_truth.categories[k].id] for k in self.matches.classes]

    @cached_property
    def objects_of_class(self) -> Ints:
        """How many objects of each class count."""
        counted = ~self.matches.objects.is_ignored[:, 0]
        return np.bincount(self.mistakes.truth[counted], minlength=len(self.class_names))


def evaluated(name: str, ground_truth: CocoAnnotations, images: Path | None, table: DetectionTable) -> Evaluated:
    """The evaluation of a table of ``ground_truth``."""
    matches = match(ground_truth, table)
    curves = accumulate(matches)
    return Evaluated(name, ground_truth, images, table, matches, curves, metrics_of(ground_truth, len(table), curves))
