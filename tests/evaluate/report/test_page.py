from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddetr_cli.evaluate.metrics import METRICS
from ddetr_cli.evaluate.report import page


def test_a_page_is_whole_and_asks_for_nothing_outside(checked: Callable[[str], Any]) -> None:
    parts = [page.section("Part", page.table(["", "value"], [["a", "1"]]), note="a note")]
    found = checked(page.page("title", ["fact", "other"], parts))
    assert all(value.startswith("data:") for _, name, value in found.attributes if name in ("src", "href"))
    assert "fact · other" in found.text
    assert ("meta", "content", "width=device-width, initial-scale=1") in found.attributes


def test_text_from_elsewhere_cannot_become_html() -> None:
    nasty = '<script>alert("x")</script>\x1b[31m'
    for text in (page.page(nasty, [nasty], []), page.table([nasty], []), page.section(nasty), page.escape(nasty)):
        assert "<script>" not in text
        assert "\x1b" not in text


def test_the_tiles_show_numbers_intervals_and_what_is_not_there(checked: Callable[[str], Any]) -> None:
    numbers = dict.fromkeys(METRICS, 0.12345) | {"APs": None}
    found = checked(page.tiles(numbers, {"AP": (0.1, 0.2), "APs": None}))
    assert "AP0.123IoU 0.50 to 0.950.100 to 0.200" in found.text
    assert "APsn/a" in found.text


def test_a_folded_table_has_a_line_to_click(checked: Callable[[str], Any]) -> None:
    text = page.table(["a", "meaning"], [["1", "words"]], folded="the rest")
    assert text.startswith("<details><summary>the rest</summary>")
    assert ("td", "class", "words") in checked(text).attributes


def test_every_number_is_defined_in_words() -> None:
    assert page.definition("AP50") == "IoU 0.50, all, 100 a picture and class"
    assert all(page.definition(name) for name in METRICS)
