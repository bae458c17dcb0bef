"""Pictures with the boxes of a run over them: what was found, what was missed, and what was wrong."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddetr_cli.data.coco import CocoImage, read_dataset_image
from ddetr_cli.errors import DdetrError
from ddetr_cli.evaluate.matching import Flags, Ints
from ddetr_cli.evaluate.mistakes import HIT, KINDS
from ddetr_cli.evaluate.report.evaluated import Evaluated
from ddetr_cli.printable import printable

LONGEST_SIDE = 640
_LABELLED = 0.07  # of the picture's width; the labels of smaller boxes would hide each other

# Told apart by dashes as well as by colour.
LEGEND = {"found": "found", "missed": "missed", "wrong": "wrong detection"}


@dataclass(frozen=True)
class Tally:
    """The objects and the wrong detections of one image, by its place in the data set."""

    position: int
    found: Ints
    missed: Ints
    wrong: Ints

    @property
    def mistakes(self) -> int:
        """How many things are wrong with it."""
        return len(self.missed) + len(self.wrong)


def tallies(run: Evaluated) -> list[Tally]:
    """One for each image, in the order of the data set: at the score of the best F1."""
    objects, verdicts = run.matches.objects, run.verdicts
    counted = ~objects.is_ignored[:, 0]
    wrong = verdicts.kept & (run.mistakes.kind != HIT)
    # Detections know their image by rank.
    position = np.argsort(run.matches.image_rank)[run.matches.image]
    images = len(run.ground_truth.images)
    columns = [
        _by_image(objects.image, counted & verdicts.is_found, images),
        _by_image(objects.image, counted & ~verdicts.is_found, images),
        _by_image(position, wrong, images),
    ]
    return [Tally(index, *(column[index] for column in columns)) for index in range(images)]


def worst(run: Evaluated, count: int) -> list[Tally]:
    """The images with the most mistakes, those with none left out."""
    ordered = sorted(tallies(run), key=lambda tally: -tally.mistakes)
    return [tally for tally in ordered[:count] if tally.mistakes]


def _by_image(image: Ints, chosen: Flags, images: int) -> list[Ints]:
    """The positions that are chosen, for each image."""
    order = np.flatnonzero(chosen)
    order = order[np.argsort(image[order], kind="stable")]
    return np.split(order, np.searchsorted(image[order], np.arange(1, images)))


def picture(run: Evaluated, tally: Tally) -> str:
    """HTML: the picture, if it can be read, under its boxes; a grey field otherwise."""
    image = run.ground_truth.images[tally.position]
    rows, mistakes, names = run.table.boxes_xywh[run.matches.row], run.mistakes, run.class_names
    boxes = run.matches.objects.boxes_xywh
    width, height = max(image.width, 1), max(image.height, 1)

    def label(text: str, bbox_xywh: Sequence[float]) -> str:
        return text if bbox_xywh[2] >= _LABELLED * width else ""

    shapes = [_box("found", boxes[g], f"found: {names[mistakes.truth[g]]}") for g in tally.found]
    for n in tally.wrong:
        kind = KINDS[mistakes.kind[n]] if mistakes.kind[n] >= 0 else "wrong"
        said = f"{names[mistakes.label[n]]} {run.matches.scores[n]:.2f}"
        shapes.append(_box("wrong", rows[n], f"wrong ({kind}): {said}", label(said, rows[n])))
    for g in tally.missed:
        name = names[mistakes.truth[g]]
        shapes.append(_box("missed", boxes[g], f"missed: {name}", label(name, boxes[g])))
    # Letters of one size on every picture, whatever its own.
    font = f' style="font-size:{max(width, height) / 42:.1f}px"'
    return (
        f'<div class="picture">{_pixels(run.images, image)}'
        f'<svg viewBox="0 0 {width} {height}" aria-hidden="true"{font}>{"".join(shapes)}</svg></div>'
    )


def caption(run: Evaluated, tally: Tally) -> str:
    """HTML: the name of the picture and what is wrong with it, in words."""
    image = run.ground_truth.images[tally.position]
    kinds = [KINDS[kind] for kind in run.mistakes.kind[tally.wrong].tolist() if kind >= 0]
    parts = [f"{len(tally.found)} found", f"{len(tally.missed)} missed", f"{len(tally.wrong)} wrong"]
    told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)
    return f"<b>{html.escape(printable(image.file_name))}</b>: {', '.join(parts)}" + (f" ({told})" if told else "")


def _box(kind: str, bbox_xywh: Sequence[float], title: str, label: str = "") -> str:
    x, y, w, h = (round(float(value), 1) for value in bbox_xywh)
    text = (
        f'<text x="{x}" y="{y}" dy="-0.25em" class="{kind}">{html.escape(printable(label))}</text>' if label else ""
    )
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" class="{kind}">'
        f"<title>{html.escape(printable(title))}</title></rect>{text}"
    )


def _pixels(root: Path | None, image: CocoImage) -> str:
    name = html.escape(printable(image.file_name), quote=True)
    ratio = f"{max(image.width, 1)} / {max(image.height, 1)}"
    empty = f'<div class="empty" style="aspect-ratio:{ratio}"></div>'
    if root is None:
        return empty
    try:
        pixels = read_dataset_image(root, image)
    except DdetrError:
        return empty
    pixels.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    content = io.BytesIO()
    pixels.save(content, format="JPEG", quality=80)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{name}" width="{pixels.width}" height="{pixels.height}">'
