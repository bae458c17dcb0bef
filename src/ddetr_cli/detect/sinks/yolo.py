"""Boxes as text files in YOLO's layout, as labelling tools and trainers read them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from ddetr_cli.atomic import write_atomically
from ddetr_cli.detect.sinks.formats import CLASSES_FILE, LABELS_FOLDER
from ddetr_cli.detect.sinks.names import Stale, label_name
from ddetr_cli.detect.sinks.writing import to_text
from ddetr_cli.printable import printable

if TYPE_CHECKING:
    from pathlib import Path

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.results import ImageResult


class YoloSink:
    """``labels/``: a text file per image, lines ``class x y w h``; ``classes.txt``: the names, by line.

    x and y are the centre; all four are fractions of the upright picture, of the part of the box that lies on it. A
    box wholly outside has no line, an image without detections an empty file, a failed one none. Scores have no
    place in such files. Classes are numbered from 0 without gaps: those with a name first.
    """

    render = None

    def __init__(self, output: Path, classes: ClassTable) -> None:
        self._output = output
        self._stale = Stale(output, output / LABELS_FOLDER, label_name)
        order = sorted(range(len(classes)), key=lambda index: (classes.names[index] is None, index))
        self._numbers = {index: number for number, index in enumerate(order)}
        self._names = [printable(classes.name(index)) for index in order]

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Write the image's file."""
        if result.size_wh is None or result.failure is not None:
            return
        self._stale.keep(result.input.name)
        lines = "".join(
            f"{self._numbers[label]} {fractions}\n"
            for box, label in zip(result.boxes_xyxy_px, result.labels, strict=True)
            if (fractions := _fractions(box, result.size_wh))
        )
        path = self._output / LABELS_FOLDER / label_name(result.input.name)
        write_atomically(path, lines.encode("ascii"), durable=False)

    def finish(self) -> None:
        """Write the names, and remove files of an earlier run whose images are gone."""
        write_atomically(self._output / CLASSES_FILE, to_text("\n".join(self._names) + "\n"), durable=True)
        for path in self._stale.paths():
            with suppress(OSError):
                path.unlink()

    def abandon(self) -> None:
        """Nothing to do: every file is written whole or not at all."""


def _fractions(box_xyxy: tuple[float, float, float, float], size_wh: tuple[int, int]) -> str:
    """Centre and size of the part on the picture; nothing where that has no area."""
    width, height = size_wh
    x0, x1 = (min(max(x / width, 0.0), 1.0) for x in box_xyxy[0::2])
    y0, y1 = (min(max(y / height, 0.0), 1.0) for y in box_xyxy[1::2])
    sides = [f"{value:.6f}" for value in ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)]
    return "" if "0.000000" in sides[2:] or x1 < x0 or y1 < y0 else " ".join(sides)
