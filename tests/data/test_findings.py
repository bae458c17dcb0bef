from __future__ import annotations

import pytest

from ddetr_cli.data.findings import Finding, Tally, refuse_if_needed, repeated, told
from ddetr_cli.errors import DatasetError


def test_a_tally_counts_each_kind_and_keeps_its_first_five() -> None:
    tally = Tally("boxes", 20)
    for n in range(7):
        tally.add("dropped", "too small", f"box {n}")
    tally.add("repaired", "no area", count=3)
    small, area = tally.findings()
    assert small.sentence() == "7 of 20 boxes dropped: too small (box 0, box 1, box 2, box 3, box 4, ...)."
    assert area.sentence() == "3 of 20 boxes: no area."


def test_a_finding_about_a_whole_file_has_no_count() -> None:
    assert Finding("refused", "not JSON", remedy="Copy it again.").sentence() == "not JSON. Copy it again."


def test_a_long_example_is_cut() -> None:
    sentence = Finding("noted", "odd", 1, 2, "names", ("x" * 10_000,)).sentence()
    assert sentence == f"1 of 2 names: odd ({'x' * 117}...)."


def test_the_first_refusal_is_raised_and_the_others_are_counted() -> None:
    findings = [Finding("noted", "fine"), Finding("refused", "bad"), Finding("refused", "worse")]
    with pytest.raises(DatasetError, match=r"a.json: bad\. ddetr train --check names 1 more\."):
        refuse_if_needed("a.json", findings)
    refuse_if_needed("a.json", findings[:1])


def test_backgrounds_and_refusals_are_not_told_as_warnings() -> None:
    outcomes = ("refused", "dropped", "repaired", "background", "noted")
    assert told("a.json", [Finding(outcome, outcome) for outcome in outcomes]) == [
        "a.json: dropped.",
        "a.json: repaired.",
        "a.json: noted.",
    ]


def test_repeated_values_are_listed_once() -> None:
    assert repeated(["a", "b", "a", "c", "a", "b"]) == ["'a'", "'b'"]
