"""One picture of the whole run, for people who would rather look."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from ddetr_cli.atomic import write_atomically
from ddetr_cli.data.formats import MAX_PIXELS
from ddetr_cli.detect.drawing import PALETTE, draw_detections, label_name, load_font, spell
from ddetr_cli.detect.patience import READ_TIMEOUT
from ddetr_cli.detect.reading import read_input
from ddetr_cli.detect.sources import SHEET_FILE
from ddetr_cli.detect.video import Frame, Video
from ddetr_cli.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.results import ImageResult
    from ddetr_cli.detect.sources import Input

MOST_PICTURES = 48
THUMBNAIL_PX = 320  # longer side
_COLUMNS = 8
_GAP, _LINE = 12, 22  # px, of a cell's margin and of a line of text
_FONT = 16
_BACKGROUND, _INK, _DIM, _EMPTY = (250, 250, 250), (20, 20, 20), (95, 95, 95), (205, 205, 205)


class SheetSink:
    """``sheet.jpg``: up to 48 pictures of the run, evenly chosen, small, with their boxes, names and counts.

    It remembers results, not pictures: those on the sheet are read again at the end, by ``read``, which takes an
    input and gives the RGB picture, perhaps reduced; one that is no longer there (ImageError) is a grey field.
    """

    render = None

    def __init__(self, output: Path, classes: ClassTable, read: Callable[[Input], Image.Image]) -> None:
        self._path = output / SHEET_FILE
        ids = classes.category_ids
        self._names = [label_name(classes.name(index), ids[index]) for index in range(len(classes))]
        self._read = read
        self._kept: list[ImageResult] = []
        self._every = 1  # of the pictures that could be read, how many there are for one that is kept
        self._seen = 0
        self._failed = 0
        self._counts: Counter[int] = Counter()

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        """Count one result, and remember it if it is among the evenly chosen."""
        if result.failure is not None or result.size_wh is None:
            self._failed += 1
            return
        self._counts.update(result.labels)
        if self._seen % self._every == 0:
            self._kept.append(result)
        self._seen += 1
        if len(self._kept) > 2 * MOST_PICTURES:
            self._kept = self._kept[::2]
            self._every *= 2

    def finish(self) -> None:
        """Draw the sheet and write it."""
        buffer = io.BytesIO()
        self._draw(self._chosen()).save(buffer, "JPEG", quality=88)
        write_atomically(self._path, buffer.getvalue(), durable=True)

    def abandon(self) -> None:
        """Nothing to do: nothing is written before the end."""

    def _chosen(self) -> list[ImageResult]:
        kept = self._kept
        if len(kept) <= MOST_PICTURES:
            return kept
        return [kept[index * (len(kept) - 1) // (MOST_PICTURES - 1)] for index in range(MOST_PICTURES)]

    def _draw(self, results: Sequence[ImageResult]) -> Image.Image:
        columns = max(1, min(_COLUMNS, len(results)))
        rows = -(-len(results) // columns)
        width = max(columns, 3) * (THUMBNAIL_PX + _GAP) + _GAP
        head = self._head(width - 2 * _GAP)
        top = _GAP + len(head) * _LINE + _GAP
        cell = THUMBNAIL_PX * 3 // 4 + 2 * _LINE + _GAP
        sheet = Image.new("RGB", (width, top + rows * cell), _BACKGROUND)
        pen = ImageDraw.Draw(sheet)
        for number, line in enumerate(head):
            x = _GAP
            for text, colour in line:
                if colour is not None:
                    pen.rectangle((x, _GAP + number * _LINE + 3, x + 11, _GAP + number * _LINE + 14), fill=colour)
                    x += 17
                pen.text((x, _GAP + number * _LINE), text, fill=_INK, font=load_font(_FONT))
                x += round(load_font(_FONT).getlength(text)) + 18
        for index, result in enumerate(results):
            corner = (_GAP + index % columns * (THUMBNAIL_PX + _GAP), top + index // columns * cell)
            self._draw_cell(sheet, pen, corner, result)
        return sheet

    def _draw_cell(
        self, sheet: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], result: ImageResult
    ) -> None:
        left, top = corner
        room = (THUMBNAIL_PX, THUMBNAIL_PX * 3 // 4)
        drawn = self._thumbnail(result, room)
        sheet.paste(drawn, (left + (room[0] - drawn.width) // 2, top + (room[1] - drawn.height) // 2))
        counts = Counter(result.labels).most_common()
        found = ", ".join(f"{count} {self._names[label]}" for label, count in counts) or "nothing found"
        for line, (text, ink) in enumerate(((PurePosixPath(result.input.name).name, _INK), (found, _DIM))):
            shown = _fit(text, room[0])
            pen.text((left, top + room[1] + 2 + line * _LINE), shown, fill=ink, font=load_font(_FONT))

    def _thumbnail(self, result: ImageResult, room: tuple[int, int]) -> Image.Image:
        assert result.size_wh is not None
        whole = result.size_wh
        scale = min(room[0] / whole[0], room[1] / whole[1], 1.0)
        small = (max(1, round(whole[0] * scale)), max(1, round(whole[1] * scale)))
        try:
            picture = self._read(result.input).resize(small, Image.Resampling.BILINEAR, reducing_gap=2.0)
        except ImageError:
            return Image.new("RGB", small, _EMPTY)
        ratio = (small[0] / whole[0], small[1] / whole[1])
        boxes = [
            (x0 * ratio[0], y0 * ratio[1], x1 * ratio[0], y1 * ratio[1]) for x0, y0, x1, y1 in result.boxes_xyxy_px
        ]
        return draw_detections(picture, boxes, result.labels, result.scores, None)

    def _head(self, width: int) -> list[list[tuple[str, tuple[int, int, int] | None]]]:
        """What stands above the pictures, in lines of (text, colour of the square before it)."""
        total = sum(self._counts.values())
        pictures = self._seen + self._failed
        shown = f"{len(self._chosen())} of " if len(self._chosen()) < pictures else ""
        failed = f", {self._failed} could not be read" if self._failed else ""
        entries: list[tuple[str, tuple[int, int, int] | None]] = [
            (f"{shown}{pictures} picture{'' if pictures == 1 else 's'}{failed}; {total} detections", None)
        ]
        for label, count in sorted(self._counts.items(), key=lambda pair: (-pair[1], pair[0])):
            text = _fit(f"{count} {self._names[label]}", width / 3)
            entries.append((text, PALETTE[label % len(PALETTE)]))
        lines: list[list[tuple[str, tuple[int, int, int] | None]]] = [[]]
        x = 0.0
        for entry in entries:
            length = load_font(_FONT).getlength(entry[0]) + 17 + 18
            if lines[-1] and x + length > width:
                if len(lines) == 3:  # a hundred classes would push the pictures off the page
                    break
                lines.append([])
                x = 0.0
            lines[-1].append(entry)
            x += length
        return lines


def thumbnail_reader(
    *,
    max_pixels: int = MAX_PIXELS,
    allow_truncated: bool = False,
    read_timeout: float = READ_TIMEOUT,
    should_stop: Callable[[], bool] = lambda: False,
) -> Callable[[Input], Image.Image]:
    """What reads an input once more for the sheet, reduced where that is quicker. It raises ImageError.

    After one that is not read in time no other is tried: of 48 each would wait as long for the disk that is gone.
    """
    last: Video | None = None
    is_gone = False

    def read(item: Input) -> Image.Image:
        nonlocal last, is_gone
        if is_gone:
            raise ImageError(f"{item.where}: not read (its disk or server does not answer).")
        video = item.origin.video if isinstance(item.origin, Frame) else None
        if last is not None and last is not video:
            last.close()  # of 48 videos the frames beside those on the sheet would fill the memory
        last = video
        try:
            return read_input(
                item,
                short=THUMBNAIL_PX,
                max_pixels=max_pixels,
                allow_truncated=allow_truncated,
                read_timeout=read_timeout,
                should_stop=should_stop,
            ).image
        except ImageError as error:
            is_gone = isinstance(error.__cause__, TimeoutError)
            raise

    return read


def _fit(text: str, room: float) -> str:
    """``text`` in the letters there are, cut to ``room`` pixels."""
    font = load_font(_FONT)
    plain = spell(text[: int(room)])  # no letter is narrower than a pixel; measuring a page of text takes minutes
    if font.getlength(plain) <= room:
        return plain
    while plain and font.getlength(plain + "...") > room:
        plain = plain[:-1]
    return plain + "..."
