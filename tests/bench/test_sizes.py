"""Sizes beside the published ones, and the mean over the first pictures of val2017."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddetr_cli.bench.options import SIZES, BenchOptions
from ddetr_cli.bench.published import PUBLISHED
from ddetr_cli.bench.run import run_bench
from ddetr_cli.bench.sizes import SizesSection, first_picture_sizes
from ddetr_cli.errors import DatasetError, UsageError
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import FASTER_RCNN, PRESETS


def write_val(folder: Path, sizes_wh: list[tuple[int, int]]) -> Path:
    """A COCO root whose pictures, listed backwards, have ids 1, 2, ... and these sizes."""
    images = [
        {"id": number, "file_name": f"{number:012}.jpg", "width": width, "height": height}
        for number, (width, height) in enumerate(sizes_wh, start=1)
    ][::-1]
    document = {
        "images": images,
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "person"}],
    }
    path = folder / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps(document))
    return path


def sizes_of(*models: str, size_hw: tuple[int, int], val2017: Path | None = None) -> SizesSection:
    options = BenchOptions(models, size_hw=size_hw, device="cpu", measurements=(SIZES,), val2017=val2017)
    (section,) = run_bench(options).sections
    assert isinstance(section, SizesSection)
    return section


def test_every_system_of_the_model_card_has_published_figures() -> None:
    assert set(PUBLISHED) == {name for name in PRESETS if "tiny" not in name}


def test_published_parameters_are_ours_rounded_as_published() -> None:
    # 0.55 million: the authors count DETR as 41 and Faster R-CNN as 42 million.
    for name, published in PUBLISHED.items():
        if PRESETS[name].family != FASTER_RCNN:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in build_detector(PRESETS[name]).parameters())
            assert abs(parameters - published.parameters) < 0.55e6, name


def test_the_published_column_stands_beside_ours_with_the_difference() -> None:
    section = sizes_of("r50-single-scale", size_hw=(800, 1120))
    (table,) = section.tables()
    (row,) = table.rows
    found = dict(zip(table.headings, row, strict=True))
    assert (found["published GFLOPs"], found["published params M"]) == ("78", "34")
    ours = section.results[0].size.flops
    assert found["difference"] == f"{ours / 78e9 - 1:+.1%}"


def test_at_another_size_than_the_published_no_difference_is_claimed() -> None:
    (table,) = sizes_of("r50-single-scale", size_hw=(64, 64)).tables()
    assert dict(zip(table.headings, table.rows[0], strict=True))["difference"] == ""


def test_a_model_nobody_published_has_no_published_figures() -> None:
    (row,) = sizes_of("tiny", size_hw=(64, 64)).to_json()
    assert row["published_flops"] is None


def test_the_first_hundred_pictures_are_those_with_the_smallest_ids(tmp_path: Path) -> None:
    sizes = [(640, 480)] * 60 + [(480, 640)] * 40 + [(100, 100)] * 5
    path = write_val(tmp_path, sizes)
    assert first_picture_sizes(tmp_path) == first_picture_sizes(path) == sizes[:100]


def test_the_mean_is_over_the_sizes_the_model_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddetr_cli.bench.flops.count_flops", lambda _, size_hw: {"all": size_hw[0] * size_hw[1]})
    write_val(tmp_path, [(640, 480), (640, 480), (480, 480)])
    section = sizes_of("tiny", size_hw=(64, 64), val2017=tmp_path)
    assert section.results[0].val_flops == pytest.approx((2 * 320 * 426 + 320 * 320) / 3)
    (table,) = section.tables()
    assert "GFLOPs val2017" in table.headings


@pytest.mark.parametrize("content", ["{", '{"images": []}'])
def test_a_bad_annotation_file_is_refused_before_anything_is_counted(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "instances_val2017.json"
    path.write_text(content)
    monkeypatch.setattr("ddetr_cli.bench.sizes.measure_size", lambda *_: pytest.fail("counted"))
    with pytest.raises(DatasetError, match=r"instances_val2017\.json"):
        sizes_of("tiny", size_hw=(64, 64), val2017=path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent"):
        sizes_of("tiny", size_hw=(64, 64), val2017=tmp_path / "absent")
