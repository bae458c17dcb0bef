"""The breakdown of one picture, and the floor it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

from ddetr_cli.bench.ceilings import CONVOLUTIONS, Ceilings, ceiling_probes
from ddetr_cli.bench.flops import ModelSize
from ddetr_cli.bench.options import BenchOptions
from ddetr_cli.bench.stages import DRAWN_BOXES, StageResult, StagesSection, measure_stages
from ddetr_cli.bench.subjects import open_model
from ddetr_cli.bench.tables import Silence
from ddetr_cli.bench.timing import Samples
from ddetr_cli.classes import ClassTable
from ddetr_cli.inference.detections import ImageDetections
from ddetr_cli.ops.dense import dense_engine
from ddetr_cli.presets import get_preset

CPU = torch.device("cpu")


class Finisher:
    """Notes what it is given."""

    drawn: ClassVar[list[tuple[tuple[int, int], int]]] = []
    written: ClassVar[list[object]] = []

    def __init__(self, classes: ClassTable, folder: Path) -> None:
        assert folder.is_dir()

    def draw(self, picture: Image.Image, found: ImageDetections) -> object:
        Finisher.drawn.append((picture.size, len(found.scores)))
        return "drawn"

    def write(self, drawn: object) -> None:
        Finisher.written.append(drawn)

    def close(self) -> None:
        Finisher.written.append("closed")


@pytest.fixture(scope="module")
def section() -> StagesSection:
    # The probes have the size of real ones; tests need no machine's peak.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddetr_cli.bench.ceilings.CONVOLUTIONS", ((32, 8, 8), (64, 4, 4)))
        patch.setattr("ddetr_cli.bench.ceilings.COPY_BYTES", 1 << 20)
        options = BenchOptions(
            ("tiny",), size_hw=(64, 85), precisions=("fp32", "bf16"), device="cpu", rounds=2, warmup=1
        )
        section = measure_stages(options, [open_model("tiny", Silence())], CPU, Finisher, Silence())
        section.to_json()
        section.tables()
    return section


def test_stages_are_those_from_the_file_to_the_files_in_their_order(section: StagesSection) -> None:
    for result in section.results:
        stages = list(result.stages)
        assert stages[:2] == ["image decoding", "preprocessing"]
        assert stages[-4:] == ["rest of the model", "post-processing", "drawing", "writing"]


def test_the_parts_of_the_model_have_their_names_on_the_fast_path_too(section: StagesSection) -> None:
    for result in section.results:
        parts = list(result.stages)[2:-4]
        assert sorted(parts) == ["backbone", "decoder", "encoder", "heads", "input projections"]


def test_the_model_is_its_parts_and_the_post_processing() -> None:
    taken = {"image decoding": 64, "preprocessing": 32, "backbone": 16, "rest of the model": 8, "post-processing": 4}
    stages = {name: Samples((float(seconds),)) for name, seconds in (taken | {"drawing": 2, "writing": 1}).items()}
    result = StageResult(
        "m", "fp32", stages, Samples((29.0,)), ModelSize(1, 1, {}), Samples((14.0,)), Samples((13.0,))
    )
    assert result.model_seconds == 28.0


def test_a_slow_round_slows_the_model_and_its_floor_alike() -> None:
    times = {"PyTorch": (1.0, 3.0, 1.0), "fp32 AMX": (0.5, 2.0, 0.5)}
    ceilings = Ceilings(
        (64, 64),
        {
            f"convolution 3x3 {c}x{h}x{w}, {name}, fp32": Samples(values).scaled(9 * c * c * h * w)
            for name, values in times.items()
            for c, h, w in CONVOLUTIONS
        },
    )
    size = ModelSize(1, 1, {"convolution": 4, "deformable": 0})
    config = get_preset("detr-r50")
    floors = [ceilings.floor(config, size, "fp32", by) for by in ("", "PyTorch")]
    assert [floor.values for floor in floors] == [pytest.approx((2.0, 8.0, 2.0)), pytest.approx((4.0, 12.0, 4.0))]
    result = StageResult("m", "fp32", {}, Samples((4.0, 16.0, 4.0)), size, *floors)
    assert result.floor_share.values == pytest.approx((0.5, 0.5, 0.5))


def test_every_stage_has_a_sample_of_every_round(section: StagesSection) -> None:
    for result in section.results:
        assert {len(samples.values) for samples in result.stages.values()} == {2}
        assert all(value > 0 for samples in result.stages.values() for value in samples.values)


def test_a_few_boxes_are_drawn_on_a_photograph_smaller_than_what_the_model_sees(section: StagesSection) -> None:
    assert set(Finisher.drawn) == {((51, 38), DRAWN_BOXES)}
    assert set(Finisher.written[:-2]) == {"drawn"}


def test_writing_is_closed_at_the_end(section: StagesSection) -> None:
    assert Finisher.written[-2:] == ["closed", "closed"]  # one for each precision


def test_both_precisions_are_broken_down(section: StagesSection) -> None:
    assert [result.precision for result in section.results] == ["fp32", "bf16"]


def ceilings_of(seconds: dict[str, float]) -> Ceilings:
    return Ceilings((64, 64), {name: Samples((value,)) for name, value in seconds.items()})


def test_the_floor_is_flops_at_the_best_convolution_and_the_encoders_op(monkeypatch: pytest.MonkeyPatch) -> None:
    config = get_preset("r50")
    monkeypatch.setattr("ddetr_cli.bench.ceilings.dense_engine", lambda _: None)
    names = list(ceiling_probes((64, 64), [config], ["fp32"], 1, CPU))
    # The last convolution does its 9 * 512 * 512 * 25 * 42 multiply-adds at 1e9 a second, the others at half that.
    rates = [0.5e9, 0.5e9, 1e9]
    times = {
        name: 9 * c * c * h * w / rate for name, (c, h, w), rate in zip(names, CONVOLUTIONS, rates, strict=False)
    }
    times |= {names[3]: 0.25, names[4]: 1.0, names[5]: 1.0}
    ceilings = ceilings_of(times)
    assert ceilings.peak("fp32") == pytest.approx(1e9)
    assert ceilings.peak_of("fp32") == "PyTorch"
    size = ModelSize(1, 1, {"convolution": 3_000_000_000, "linear": 1_000_000_000, "deformable": 77})
    assert ceilings.floor(config, size, "fp32").values == pytest.approx([4.0 + 6 * 0.25])
    assert ceilings.floor(get_preset("detr-r50"), size, "fp32").values == pytest.approx([4.0])


def test_the_peak_is_that_of_the_engine_that_inference_runs_on_where_it_is_higher() -> None:
    by = {"PyTorch": 2.0, "fp32 AMX": 0.5, "bf16 AMX": 0.1}
    seconds = {
        f"convolution 3x3 {c}x{h}x{w}, {name}, {name.split()[0] if ' ' in name else 'fp32'}": s * 9 * c * c * h * w
        for name, s in by.items()
        for c, h, w in CONVOLUTIONS
    }
    ceilings = ceilings_of(seconds)
    assert (ceilings.peak("fp32"), ceilings.peak_of("fp32")) == (pytest.approx(2.0), "fp32 AMX")
    assert (ceilings.peak("bf16"), ceilings.peak_of("bf16")) == (pytest.approx(10.0), "bf16 AMX")
    assert len(ceilings.table().rows) == 9


def test_our_engine_is_probed_beside_pytorch() -> None:
    engine = dense_engine(torch.float32)
    if engine is None:
        pytest.skip("no engine on this processor")
    probes = ceiling_probes((64, 64), [], ["fp32"], 1, CPU)
    own = [name for name in probes if name.endswith(f", {engine.name}, fp32")]
    assert len(own) == len(CONVOLUTIONS)
    probes[own[0]]()


def test_rates_of_memory_count_what_is_read_and_written() -> None:
    ceilings = ceilings_of({"copy": 2.0, "fill fresh memory": 4.0})
    assert ceilings.copy_rate == (256 << 20)
    assert ceilings.fresh_rate == (256 << 20) / 4


def test_the_op_is_probed_once_for_models_that_share_its_form() -> None:
    configs = [get_preset(name) for name in ("r50", "r50-refine", "r50-single-scale", "detr-r50")]
    names = [name for name in ceiling_probes((64, 64), configs, ["fp32"], 1, CPU) if name.startswith("op")]
    assert names == [
        "op on a cached value, 4 levels of 8x32 fp32",
        "op on a cached value, 1 levels of 8x32 fp32",
    ]
