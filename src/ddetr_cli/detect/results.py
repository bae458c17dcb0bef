"""What a run makes of an input, who keeps it, and the counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.sources import Input


@dataclass(frozen=True)
class ImageResult:
    """One input when it is finished: its detections that were kept, or why it failed."""

    input: Input
    image_id: int
    size_wh: tuple[int, int] | None = None  # upright, None where the picture could not be read
    boxes_xyxy_px: list[tuple[float, float, float, float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # class indices
    dropped: int = 0  # detections that were not finite numbers
    failure: str | None = None
    truncated: bool = False  # the file breaks off; the end of the picture is made up
    seconds: float = 0.0  # this image's share of the model's time
    is_reached: bool = True  # False where the run was stopped while it was read; then it has a failure


class Sink(Protocol):
    """Something that keeps results. ``add`` and ``finish`` raise OutputError."""

    @property
    def render(self) -> Callable[[ImageResult, Image.Image], bytes] | None:
        """The slow part of keeping a result, without any effect; called on any thread. None for a sink without."""

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Take one result, in input order, and what ``render`` made of it.

        None where the image failed, and where an earlier run finished it: its file is there, a table needs its rows.
        """

    def finish(self) -> None:
        """Everything has been added: make it final."""

    def abandon(self) -> None:
        """The run broke off: leave no temporary file."""


@dataclass
class RunSummary:
    """How a run ended. ``classes`` counts detections by class index."""

    processed: int = 0
    failed: int = 0
    resumed: int = 0  # of both: finished by an earlier run
    unfinished: int = 0  # not reached, because the run was stopped
    dropped: int = 0
    detections: int = 0
    classes: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


def count_result(summary: RunSummary, result: ImageResult) -> None:
    """Add one result to the counts."""
    if result.failure is not None:
        summary.failed += 1
        return
    summary.processed += 1
    summary.dropped += result.dropped
    summary.detections += len(result.labels)
    for label in result.labels:
        summary.classes[label] = summary.classes.get(label, 0) + 1


def class_counts(summary: RunSummary, classes: ClassTable) -> list[tuple[str, int]]:
    """(name, detections) of every class that was found, the most frequent first."""
    pairs = [(classes.name(label), count) for label, count in summary.classes.items()]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
