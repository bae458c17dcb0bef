"""Two reports side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddetr_cli.bench.comparison import compare_reports
from ddetr_cli.bench.options import CARD, LATENCY, OP, SCALING, SIZES, STAGES, BenchOptions
from ddetr_cli.bench.run import run_bench
from ddetr_cli.bench.timing import Samples
from ddetr_cli.errors import UsageError


def series(*values: float) -> dict[str, Any]:
    return Samples(values).to_json()


def write(path: Path, models: dict[str, dict[str, Any]], **changes: Any) -> Path:
    document: dict[str, Any] = {
        "format": 2,
        "input": {"height": 64, "width": 64, "batch_size": 1, "precisions": ["fp32"]},
        "machine": {"cpu": "A", "threads": 2},
        "versions": {"ddetr": "1.0"},
        "measurements": [
            {
                "kind": "latency",
                "result": [{"name": name, "precision": "fp32", "seconds": times} for name, times in models.items()],
            }
        ],
    }
    path.write_text(json.dumps(document | changes))
    return path


def test_ratios_are_of_medians_and_differences_are_those_beyond_the_middle_halves(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", {"r50": series(1, 2, 3), "tiny": series(10, 11, 12), "x": series(1)})
    second = write(tmp_path / "b.json", {"r50": series(4, 5, 6), "tiny": series(9, 12, 13), "y": series(1)})
    found = compare_reports(first, second)
    assert [(pair.name, pair.ratio, pair.is_different) for pair in found.pairs] == [
        ("latency r50 fp32", 2.5, True),
        ("latency tiny fp32", 12 / 11, False),
    ]
    assert found.only_in_one == ("latency x fp32", "latency y fp32")
    assert [row[-1] for row in found.table().rows] == ["slower", "within the noise"]


def test_what_else_differs_is_said(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", {"r50": series(1)})
    second = write(
        tmp_path / "b.json", {"r50": series(1)}, machine={"cpu": "B", "threads": 2}, versions={"ddetr": "1.1"}
    )
    assert compare_reports(first, second).differences == ("cpu: A / B", "ddetr: 1.0 / 1.1")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not a report"),
        ("[]", "not a report"),
        ('{"format": 2}', "not a report"),
        ('{"format": 1, "input": 1, "machine": 1, "versions": 1, "measurements": 1}', "not a report of this version"),
    ],
)
def test_a_file_that_is_no_report_is_refused(text: str, why: str, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.json", {"r50": series(1)}), tmp_path / "bad.json"
    bad.write_text(text)
    with pytest.raises(UsageError, match=rf"bad\.json: {why}"):
        compare_reports(good, bad)
    with pytest.raises(UsageError, match="cannot be read"):
        compare_reports(good, tmp_path / "absent.json")


def test_reports_of_other_sizes_or_other_things_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", {"r50": series(1)})
    other_size = {"height": 800, "width": 64, "batch_size": 1}
    with pytest.raises(UsageError, match="measured at 800x64, batch 1, but"):
        compare_reports(first, write(tmp_path / "b.json", {"r50": series(1)}, input=other_size))
    with pytest.raises(UsageError, match="measured different things"):
        compare_reports(first, write(tmp_path / "b.json", {"tiny": series(1)}))


def test_every_measurement_of_a_real_report_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddetr_cli.bench.scaling.AREA_SHARES", (1.0, 4.0))
    monkeypatch.setattr("ddetr_cli.bench.card.peak_process_memory", lambda *_: None)
    options = BenchOptions(
        ("tiny",), size_hw=(64, 64), precisions=("fp32", "bf16"), device="cpu", rounds=1, warmup=1,
        measurements=(SIZES, LATENCY, CARD, SCALING),
    )  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(json.dumps(run_bench(options).to_json()))
    names = [pair.name for pair in compare_reports(path, path).pairs]
    assert names == [
        "latency tiny fp32", "latency tiny bf16", "card tiny fp32", "card tiny bf16",
        "scaling tiny fp32 pixels 4096", "scaling tiny fp32 pixels 16384",
        "scaling tiny bf16 pixels 4096", "scaling tiny bf16 pixels 16384",
    ]  # fmt: skip
    assert not {OP, STAGES} & {name.split()[0] for name in names}
