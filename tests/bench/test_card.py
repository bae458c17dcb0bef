"""The model card's table: published beside measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ddetr_cli.bench.card import CardRow, CardSection, Speed, TrainingHours, measure_card
from ddetr_cli.bench.flops import ModelSize
from ddetr_cli.bench.options import CARD, CARD_MODELS, TRAIN, BenchOptions
from ddetr_cli.bench.published import PUBLISHED
from ddetr_cli.bench.run import run_bench
from ddetr_cli.bench.sizes import SizeResult
from ddetr_cli.bench.subjects import BenchModel, open_model
from ddetr_cli.bench.tables import Silence
from ddetr_cli.bench.timing import Samples
from ddetr_cli.bench.training import TrainingSection
from ddetr_cli.classes import ClassTable
from ddetr_cli.cli.timed import TrainSteps
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import get_preset
from ddetr_cli.weights import save_checkpoint

CPU = torch.device("cpu")


def card_of(*models: str, **changes: object) -> CardSection:
    values: dict[str, object] = {"size_hw": (64, 96), "device": "cpu", "rounds": 2, "warmup": 1}
    (section,) = run_bench(BenchOptions(models, measurements=(CARD,), **(values | changes))).sections  # type: ignore[arg-type]
    assert isinstance(section, CardSection)
    return section


def test_the_card_has_all_eight_systems_in_the_authors_order() -> None:
    assert tuple(PUBLISHED) == CARD_MODELS


def test_published_rates_and_hours_agree_with_each_other() -> None:
    # The authors trained on val2017's sister set: hours of an epoch, as their table gives them beside the whole.
    per_epoch = {"fasterrcnn-r50-fpn": 3.5, "detr-r50": 4.0, "detr-r50-dc5": 14.0, "r50-single-scale": 3.2,
                 "r50-single-scale-dc5": 4.3, "r50": 6.5, "r50-refine": 6.5, "r50-two-stage": 6.8}  # fmt: skip
    for name, published in PUBLISHED.items():
        assert published.train_hours / published.epochs == pytest.approx(per_epoch[name], abs=0.05), name
        assert published.rate_batch1 < published.rate_batch4


@pytest.fixture(autouse=True, scope="module")
def known_peaks() -> Iterator[None]:
    """Weighing takes a process of its own each time: test_memory does it once."""
    peaks = {"fp32": 700 << 20, "bf16": 600 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ddetr_cli.bench.card.peak_process_memory", lambda _name, _size, precision, _n: peaks[precision]
        )
        yield


@pytest.fixture(scope="module")
def section(known_peaks: None) -> CardSection:
    return card_of("r50-single-scale", "tiny", precisions=("fp32", "bf16"))


def test_published_and_measured_stand_in_one_row(section: CardSection) -> None:
    systems, speeds = section.tables()
    assert [row[0] for row in systems.rows] == ["r50-single-scale", "tiny"]
    row = dict(zip(systems.headings, systems.rows[0], strict=True))
    assert (row["epochs"], row["AP"], row["AP small"]) == ("50", "39.4", "20.6")
    assert (row["params M"], row["published GFLOPs"], row["training hours"]) == ("34.07", "78", "160 V100")
    assert float(row["GFLOPs"]) > 0
    first = dict(zip(speeds.headings, speeds.rows[0], strict=True))
    assert (first["precision"], first["V100 b1"], first["V100 b4"]) == ("fp32", "27", "42.4")
    assert [row[:2] for row in speeds.rows] == [
        ("r50-single-scale", "fp32"), ("r50-single-scale", "bf16"), ("tiny", "fp32"), ("tiny", "bf16"),
    ]  # fmt: skip


def test_images_a_second_have_their_spread_and_their_precision() -> None:
    systems = CardSection((64, 96), "cpu", (row_of("r50", Samples((0.5, 0.25, 0.2))),)).tables()[0]
    assert dict(zip(systems.headings, systems.rows[0], strict=True))["images/s"] == "4 (2.67-4.44) fp32"


def test_a_system_the_authors_do_not_know_has_no_published_figures(section: CardSection) -> None:
    row = dict(zip(section.tables()[0].headings, section.tables()[0].rows[1], strict=True))
    assert row["system"] == "tiny"
    published = ("epochs", "AP", "AP small", "published GFLOPs", "difference", "training hours")
    assert [row[name] for name in published] == [""] * 6


def test_hours_of_a_step_that_was_timed_here_take_the_place_of_the_published() -> None:
    row = dataclasses.replace(row_of("r50", Samples((1.0,))), training=TrainingHours(1234.5, "bf16"))
    section = CardSection((64, 96), "cpu", (row,))
    assert section.tables()[0].rows[0][-1] == "1,234 here, bf16"
    assert section.to_json()[0]["training"] == {"hours": 1234.5, "precision": "bf16"}


@pytest.mark.parametrize("asked", [(CARD, TRAIN), (TRAIN, CARD)])
def test_the_card_quotes_the_training_steps_of_the_same_run_but_for_what_is_not_trained(
    asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddetr_cli.bench.training.missing_packages", lambda _: ["transformers"])
    options = BenchOptions(
        ("tiny", "fasterrcnn-r50-fpn"), size_hw=(64, 96), precisions=("fp32",), device="cpu", rounds=1, warmup=1,
        measurements=asked,
    )  # fmt: skip
    steps, card = run_bench(options, training=TrainSteps()).sections
    assert isinstance(steps, TrainingSection) and isinstance(card, CardSection)
    assert [row.training for row in card.rows] == [TrainingHours(*steps.shortest_hours()), None]
    assert card.rows[0].training is not None and card.rows[0].training.precision == "fp32"


def row_of(name: str, times: Samples, *, is_fast: bool = True) -> CardRow:
    size = SizeResult(name, name, ModelSize(1, 1, {}), None, PUBLISHED.get(name))
    return CardRow(name, "random", size, (Speed("fp32", is_fast, times, 1, times, None, None),))


def test_what_runs_without_the_fast_path_is_named_beside_its_ratio() -> None:
    rows = (row_of("r50", Samples((1.0,))), row_of("detr-r50", Samples((2.0,)), is_fast=False))
    for table in CardSection((64, 96), "cpu", rows).tables():
        assert [dict(zip(table.headings, row, strict=True))["path"] for row in table.rows] == ["fast", "PyTorch"]
        assert any(note.startswith("path: fast is our own inference") for note in table.notes)
    for table in CardSection((64, 96), "cpu", rows[:1]).tables():
        assert not any(note.startswith("path:") for note in table.notes)


def test_ratios_are_to_the_same_precision_of_the_first_system(section: CardSection) -> None:
    _, speeds = section.tables()
    ratios = [dict(zip(speeds.headings, row, strict=True))["time / r50-single-scale"] for row in speeds.rows]
    assert ratios[:2] == ["1", "1"]
    assert all("x (" in ratio for ratio in ratios[2:])


def test_the_peak_is_that_of_each_precision(section: CardSection) -> None:
    _, speeds = section.tables()
    assert [row[-1] for row in speeds.rows] == ["700", "600", "700", "600"]


def test_every_sample_is_in_the_document(section: CardSection) -> None:
    document = json.loads(json.dumps(section.to_json(), allow_nan=False))
    assert document[0]["published"]["train_hours"] == 160
    assert document[1]["published"] is None
    assert [len(speed["seconds"]["samples"]) for speed in document[0]["speeds"]] == [2, 2]
    assert document[0]["speeds"][0]["best_batch"] == 1


def test_trained_models_are_scored_and_random_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_checkpoint(path, build_detector(get_preset("tiny", classes=2)), ClassTable((1, 2), ("a", "b")))
    options = BenchOptions(
        ("tiny",), size_hw=(64, 64), precisions=("fp32",), rounds=1, warmup=1, measurements=(CARD,)
    )
    scored = []

    def score(model: BenchModel, precision: str, device: torch.device) -> dict[str, float | None]:
        scored.append((model.name, precision, device))
        return {"AP": 0.445, "APs": None}

    models = [open_model(name, Silence()) for name in ("tiny", str(path))]
    section = measure_card(options, models, CPU, Silence(), score)
    assert scored == [(str(path), "fp32", CPU)]
    systems, _ = section.tables()
    assert systems.headings[4:6] == ("measured AP", "measured AP small")
    assert [row[4:6] for row in systems.rows] == [("", ""), ("44.5", "")]
