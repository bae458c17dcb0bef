"""The sinks of a run, from the names of its formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ddetr_cli.atomic import AtomicFile
from ddetr_cli.detect.sinks.coco import CocoRowsSink, CocoSink
from ddetr_cli.detect.sinks.formats import FAILURES_FILE, FORMATS, LINES_FILE, TABLE_FILE
from ddetr_cli.detect.sinks.pictures import CropsSink, PicturesSink
from ddetr_cli.detect.sinks.sheet import SheetSink, thumbnail_reader
from ddetr_cli.detect.sinks.tables import CsvSink, JsonLinesSink
from ddetr_cli.detect.sinks.yolo import YoloSink

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from PIL import Image

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.detect.results import Sink
    from ddetr_cli.detect.sinks.writing import Target
    from ddetr_cli.detect.sources import Input


def make_sinks(
    output: Path,
    formats: Collection[str],
    classes: ClassTable,
    info: dict[str, Any],
    *,
    read: Callable[[Input], Image.Image] | None = None,
) -> list[Sink]:
    """One sink for each of ``formats`` (keys of FORMATS), writing into the folder ``output``.

    ``info`` goes into images.json. ``read`` gives an input's picture, perhaps reduced, for the contact sheet.
    Raises OutputError, with nothing left behind.
    """
    makers: dict[str, Callable[[], Sink]] = {
        "coco": lambda: CocoSink(output, classes, info),
        "jsonl": lambda: JsonLinesSink(AtomicFile(output / LINES_FILE), classes),
        "csv": lambda: CsvSink(AtomicFile(output / TABLE_FILE), classes, AtomicFile(output / FAILURES_FILE)),
        "yolo": lambda: YoloSink(output, classes),
        "images": lambda: PicturesSink(output, classes),
        "crops": lambda: CropsSink(output, classes),
        "sheet": lambda: SheetSink(output, classes, read or thumbnail_reader()),
    }
    sinks: list[Sink] = []
    try:
        for maker in (makers[name] for name in FORMATS if name in formats):
            sinks.append(maker())  # noqa: PERF401 (those made before a failure must be abandoned)
    except BaseException:
        for sink in sinks:
            sink.abandon()
        raise
    return sinks


def make_stream_sink(target: Target, name: str, classes: ClassTable) -> Sink:
    """The sink that writes all of a run into one stream, as one of the formats STREAMED."""
    if name == "coco":
        return CocoRowsSink(target, classes)
    return JsonLinesSink(target, classes) if name == "jsonl" else CsvSink(target, classes)
