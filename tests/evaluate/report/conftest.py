"""An evaluation of two pictures in which everything that can go wrong does, and a parser that checks HTML."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ddetr_cli.data.records import CocoAnnotations, CocoCategory
from ddetr_cli.evaluate.report.evaluated import Evaluated, evaluated
from ddetr_cli.evaluate.table import Detection, table_of

A = (100.0, 100.0, 100.0, 100.0)
B = (300.0, 100.0, 100.0, 100.0)
NAMES = ("cat", "<dog> & $\\pi$")
FOUND = (
    Detection(1, 1, A, 0.9),
    Detection(1, 1, A, 0.8),  # duplicate
    Detection(1, 1, B, 0.7),  # class
    Detection(2, 1, (500.0, 400.0, 50.0, 50.0), 0.6),  # background
)

_VOID = {"meta", "link", "img", "br"}


class Checked(HTMLParser):
    """Raises AssertionError for tags that do not close in order; collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="session")
def checked() -> Callable[[str], Checked]:
    """Parses a page strictly."""
    return Checked


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The folder of the two pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in (1, 2):
        Image.new("RGB", (640, 480), (90, 90 * index, 90)).save(folder / f"{index}.jpg")
    return folder


@pytest.fixture
def make_run(truth: Callable[..., CocoAnnotations]) -> Callable[..., Evaluated]:
    """Evaluates detections (those above if none are given) of a cat and a dog in two pictures."""

    def make(*detections: Detection, name: str = "run", images: Path | None = None) -> Evaluated:
        categories = tuple(CocoCategory(index + 1, label) for index, label in enumerate(NAMES))
        ground_truth = truth((1, 1, A), (1, 2, B), (2, 1, A), categories=categories)
        return evaluated(name, ground_truth, images, table_of(ground_truth, detections or FOUND))

    return make
