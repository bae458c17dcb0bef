from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.detect.sinks.output import prepare_output
from ddetr_cli.detect.sources import Input, find_inputs
from ddetr_cli.errors import OutputError, UsageError

FORMATS = frozenset({"coco", "images"})


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def inputs_in(folder: Path, *names: str) -> list[Input]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise().save(folder / name)
    return find_inputs([str(folder)], output=folder / "out").images


def test_a_new_output_is_accepted_and_not_made_yet(tmp_path: Path) -> None:
    prepare_output(tmp_path / "out", inputs_in(tmp_path / "in", "a.jpg"), overwrite=False, formats=FORMATS)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_accepted_only_with_overwrite_and_keeps_what_is_not_ours(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    inputs = inputs_in(tmp_path / "in", "a.jpg")
    with pytest.raises(OutputError, match="exists already"):
        prepare_output(output, inputs, overwrite=False, formats=FORMATS)
    (output / "notes.txt").write_bytes(b"")
    with pytest.raises(OutputError, match=r"exists already\. Choose another --output, or pass --overwrite"):
        prepare_output(output, inputs, overwrite=False, formats=FORMATS)
    prepare_output(output, inputs, overwrite=True, formats=FORMATS)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_a_file_as_output_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(UsageError, match="--output takes a folder"):
        prepare_output(tmp_path / "out", inputs_in(tmp_path / "in", "a.jpg"), overwrite=True, formats=FORMATS)


def test_an_annotated_picture_never_replaces_an_input(tmp_path: Path) -> None:
    inputs = inputs_in(tmp_path / "out" / "annotated", "a.jpg")
    before = (tmp_path / "out/annotated/a.jpg").read_bytes()
    with pytest.raises(UsageError, match="would replace an input"):
        prepare_output(tmp_path / "out", inputs, overwrite=True, formats=FORMATS)
    prepare_output(tmp_path / "out", inputs, overwrite=True, formats=frozenset({"coco"}))
    assert (tmp_path / "out/annotated/a.jpg").read_bytes() == before


def test_pictures_of_one_stem_and_different_endings_do_not_meet(tmp_path: Path) -> None:
    inputs = inputs_in(tmp_path / "in", "x.jpg", "x.png", "x.tif", "x.bmp", "a/x.jpg", "b/x.jpg")
    prepare_output(tmp_path / "out", inputs, overwrite=False, formats=FORMATS)


def test_two_inputs_drawn_to_one_name_are_refused_unless_nothing_is_drawn(tmp_path: Path) -> None:
    inputs = inputs_in(tmp_path / "in", "x.tif", "x.tif.jpg")
    with pytest.raises(UsageError, match=r"its output x\.tif\.jpg is also that of"):
        prepare_output(tmp_path / "out", inputs, overwrite=False, formats=FORMATS)
    prepare_output(tmp_path / "out", inputs, overwrite=False, formats=frozenset({"coco"}))


def test_two_pictures_whose_labels_would_meet_are_refused_for_yolo(tmp_path: Path) -> None:
    inputs = inputs_in(tmp_path / "in", "x.jpg", "x.png")
    with pytest.raises(UsageError, match=r"its output x\.txt is also that of"):
        prepare_output(tmp_path / "out", inputs, overwrite=False, formats={"yolo", "coco"})
    prepare_output(tmp_path / "out", inputs, overwrite=False, formats={"images", "coco", "crops"})


def test_a_contact_sheet_or_crops_never_replace_an_input(tmp_path: Path) -> None:
    inputs = inputs_in(tmp_path / "out", "sheet.jpg")
    with pytest.raises(UsageError, match="the contact sheet would replace an input"):
        prepare_output(tmp_path / "out", inputs, overwrite=True, formats={"sheet"})
    inputs = inputs_in(tmp_path / "more", "crops/a.jpg/0001-0.50-cat.jpg")
    with pytest.raises(UsageError, match="lies among the crops to be replaced"):
        prepare_output(tmp_path / "more", inputs, overwrite=True, formats={"crops"})


def test_a_folder_where_a_result_should_go_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out/detections.csv").mkdir(parents=True)
    inputs = inputs_in(tmp_path / "in", "a.jpg")
    with pytest.raises(OutputError, match=r"detections\.csv: not written \(a folder of that name is there\)"):
        prepare_output(tmp_path / "out", inputs, overwrite=True, formats={"csv"})
    prepare_output(tmp_path / "out", inputs, overwrite=True, formats={"coco"})
