"""What a run shows besides its numbers: curves, validation pictures with boxes, and TensorBoard on request.

RUN/curves.png                       loss, AP and learning rate against epochs, drawn again after each validation
RUN/pictures/epoch_012_<name>.jpg    what that epoch's model finds in a few pictures of val
RUN/tensorboard/                     with --tensorboard
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ddetr_cli.atomic import write_atomically
from ddetr_cli.data.coco import read_dataset_image
from ddetr_cli.errors import DdetrError, UsageError
from ddetr_cli.evaluate.run import ImageResult
from ddetr_cli.plots import to_png
from ddetr_cli.train.curves import draw_curves
from ddetr_cli.train.run_state import CURVES, METRICS, PICTURES, TENSORBOARD
from ddetr_cli.train.splits import Split

PICTURES_SHOWN = 4
SHOWN_SCORE = 0.3  # a model that is still learning is unsure of what it finds
# The longer side of a picture shown; small ones are enlarged, or the names would cover all there is to see.
SHOWN_SIDE, MOST_ENLARGED = 800, 3.0


class DrawBoxes(Protocol):
    """Draws N boxes (x0, y0, x1, y1) on a copy of a picture; ``labels`` choose colours, ``names`` are written."""

    def __call__(
        self,
        image: Image.Image,
        boxes_xyxy_px: Sequence[tuple[float, float, float, float]],
        labels: Sequence[int],
        scores: Sequence[float],
        names: Sequence[str],
        /,
    ) -> Image.Image: ...


def check_tensorboard() -> None:
    """Raise UsageError where TensorBoard's files cannot be written."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard: not installed. Run pip install 'ddetr-cli[tensorboard]', or leave it out.")


class Views:
    """Shown by the process that writes. Nothing of it can end a run: what fails is warned of, and not tried again.

    Without ``draw`` there are neither curves nor pictures.
    """

    def __init__(
        self, run: Path, val: Split, draw: DrawBoxes | None, warn: Callable[[str], None], *, tensorboard: bool
    ) -> None:
        self.run, self.val, self.draw, self.warn = run, val, draw, warn
        self._board: Any = None
        self._failed: set[str] = set()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / TENSORBOARD))

    def epoch(self, row: dict[str, Any], results: Sequence[ImageResult], *, is_last: bool) -> None:
        """After an epoch: ``row`` is its line of metrics.jsonl, ``results`` what a validation found, if any."""
        if self._board is not None:
            self._try("tensorboard", lambda: self._write_board(row))
        if self.draw is not None and results:
            self._try("pictures", lambda: self._write_pictures(row["epoch"], results))
        if self.draw is not None and ("val" in row or is_last):
            if importlib.util.find_spec("matplotlib") is None:
                self._fail(CURVES, "matplotlib is not installed. Run pip install 'ddetr-cli[plots]'.")
            else:
                self._try(CURVES, self._write_curves)

    def close(self) -> None:
        """Flush what is buffered."""
        if self._board is not None:
            self._try("tensorboard", self._board.close)

    def _try(self, what: str, write: Callable[[], None]) -> None:
        if what in self._failed:
            return
        try:
            write()
        except (DdetrError, OSError, ValueError) as error:
            self._fail(what, str(error))

    def _fail(self, what: str, why: str) -> None:
        if what not in self._failed:
            self._failed.add(what)
            self.warn(f"{self.run / what}: not drawn any more ({why.rstrip('.')}). The training goes on.")

    def _write_curves(self) -> None:
        lines = (self.run / METRICS).read_text(encoding="utf-8").splitlines()
        figure = draw_curves([json.loads(line) for line in lines], str(self.run))
        write_atomically(self.run / CURVES, to_png(figure), durable=False)

    def _write_board(self, row: dict[str, Any]) -> None:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "epoch"}
        numbers |= {f"val/{name}": value for name, value in row.get("val", {}).items() if isinstance(value, float)}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, row["epoch"])
        self._board.flush()

    def _write_pictures(self, epoch: int, results: Sequence[ImageResult]) -> None:
        assert self.draw is not None
        folder = self.run / PICTURES
        folder.mkdir(exist_ok=True)
        index_of = {c.id: (index, c.name) for index, c in enumerate(self.val.annotations.categories)}
        step = max(1, len(results) // PICTURES_SHOWN)
        for result in results[::step][:PICTURES_SHOWN]:
            picture = read_dataset_image(self.val.images, result.image)
            scale = min(MOST_ENLARGED, SHOWN_SIDE / max(picture.size))
            picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
            shown = [d for d in result.detections if d.score >= SHOWN_SCORE]
            boxes = [(scale * x, scale * y, scale * (x + w), scale * (y + h)) for x, y, w, h in
                     (d.bbox_xywh for d in shown)]  # fmt: skip
            found = [index_of[d.category_id] for d in shown]
            drawn = self.draw(
                picture, boxes, [i for i, _ in found], [d.score for d in shown], [name for _, name in found]
            )
            drawn.save(folder / f"epoch_{epoch:03d}_{Path(result.image.file_name).stem}.jpg", quality=90)
