from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.classes import ClassTable
from ddetr_cli.data.images import Picture, read_picture
from ddetr_cli.detect import reading
from ddetr_cli.detect.results import ImageResult, RunSummary, class_counts
from ddetr_cli.detect.run import detect_images
from ddetr_cli.detect.selection import Selection
from ddetr_cli.detect.sources import Input, find_inputs
from ddetr_cli.errors import DeviceError, OutputError
from ddetr_cli.inference.ahead import helper_threads
from ddetr_cli.inference.detections import ImageDetections
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.inference.preparation import Preparation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ddetr_cli.inference.preparation import Prepared
    from ddetr_cli.weights import LoadedModel


class Keeper:
    """A sink that remembers everything."""

    def __init__(self, on_add: Callable[[ImageResult], None] = lambda result: None) -> None:
        self.results: list[ImageResult] = []
        self.files: list[bytes | None] = []
        self.ending = ""
        self.on_add = on_add

    render: Callable[[ImageResult, Image.Image], bytes] | None = None

    def add(self, result: ImageResult, rendered: bytes | None) -> None:
        self.on_add(result)
        self.results.append(result)
        self.files.append(rendered)

    def finish(self) -> None:
        self.ending += "finished"

    def abandon(self) -> None:
        self.ending += "abandoned"


class Drawer(Keeper):
    """One that also draws: the file of a picture is its mode and size."""

    def __init__(self, on_render: Callable[[ImageResult], None] = lambda result: None) -> None:
        super().__init__()
        self.on_render = on_render

    def render(self, result: ImageResult, picture: Image.Image) -> bytes:
        self.on_render(result)
        return f"{result.input.name} {picture.mode} {picture.size}".encode()


def write_photos(folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
    folder.mkdir(exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        values = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")


def run(
    inputs: Sequence[Input],
    loaded: LoadedModel,
    keeper: Keeper,
    *,
    threshold: float = 0.0,
    should_stop: Callable[[], bool] = lambda: False,
    device_type: str = "cpu",
    draft: bool = False,
) -> RunSummary:
    predictor = Predictor(loaded, device="cpu")
    if device_type == "cuda":  # windows and batches as on a GPU, arithmetic here
        predictor.batch_size = 4
        predictor.device = torch.device("meta")
        predictor.predict_prepared = Predictor(loaded, device="cpu").predict_prepared  # type: ignore[method-assign]
    return detect_images(
        inputs,
        predictor,
        [keeper],
        selection=Selection(threshold),
        max_pixels=10_000,
        draft=draft,
        should_stop=should_stop,
    )


def boxes(result: ImageResult) -> object:
    return result.boxes_xyxy_px, result.scores, result.labels


def test_results_come_in_input_order_with_ids_and_sizes(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(64, 48), (48, 64), (64, 48)])
    keeper = Keeper()
    summary = run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert [(r.input.name, r.image_id, r.size_wh) for r in keeper.results] == [
        ("0.png", 1, (64, 48)),
        ("1.png", 2, (48, 64)),
        ("2.png", 3, (64, 48)),
    ]
    assert keeper.files == [None, None, None]
    assert keeper.ending == "finished"
    assert (summary.processed, summary.failed, summary.detections) == (3, 0, 300)


def test_a_bad_image_between_good_ones_changes_nothing_for_them(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(64, 48)] * 8)
    inputs = find_inputs([str(tmp_path)]).images
    alone = []
    for item in inputs:
        keeper = Keeper()
        run([item], loaded, keeper)
        alone.append(keeper.results[0])
    (tmp_path / "3.png").write_bytes(b"not a picture")
    for device_type in ("cpu", "cuda"):
        keeper = Keeper()
        summary = run(inputs, loaded, keeper, device_type=device_type)
        assert (summary.processed, summary.failed) == (7, 1)
        for expected, result in zip(alone, keeper.results, strict=True):
            if result.input.name == "3.png":
                assert result.failure is not None
                assert "not an image" in result.failure
                assert result.image_id == 4
            else:
                assert boxes(result) == boxes(expected)


def test_a_file_that_goes_away_while_running_fails_alone(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(64, 48)] * 3)
    inputs = find_inputs([str(tmp_path)]).images
    (tmp_path / "1.png").unlink()
    keeper = Keeper()
    run(inputs, loaded, keeper)
    assert [r.failure for r in keeper.results] == [None, "no such file. Check the path.", None]


def test_pictures_above_the_pixel_limit_fail(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(101, 100), (100, 100)])
    keeper = Keeper()
    run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert keeper.results[0].failure is not None
    assert "exceeds the limit" in keeper.results[0].failure
    assert keeper.results[1].failure is None


def test_detections_at_the_threshold_are_kept_and_those_below_are_not(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(64, 48)])
    inputs = find_inputs([str(tmp_path)]).images
    every = Keeper()
    run(inputs, loaded, every)
    scores = every.results[0].scores
    assert len(scores) == 100
    assert scores == sorted(scores, reverse=True)
    some = Keeper()
    run(inputs, loaded, some, threshold=scores[10])
    assert some.results[0].scores == [score for score in scores if score >= scores[10]]


def test_a_request_to_stop_ends_after_the_images_in_work_and_names_the_rest(
    tmp_path: Path, loaded: LoadedModel
) -> None:
    write_photos(tmp_path, [(64, 48)] * 5)
    keeper = Keeper()
    summary = run(find_inputs([str(tmp_path)]).images, loaded, keeper, should_stop=lambda: len(keeper.results) >= 2)
    assert (summary.processed, summary.failed, summary.unfinished) == (2, 0, 3)
    assert [r.failure for r in keeper.results[2:]] == ["not processed (the run was stopped)."] * 3
    assert [r.image_id for r in keeper.results] == [1, 2, 3, 4, 5]
    assert keeper.ending == "finished"


def test_after_a_request_to_stop_no_more_pictures_are_read(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, begun = 60, []

    def read(path: Path, **options: Any) -> Picture:
        begun.append(path)
        return read_picture(path, **options)

    monkeypatch.setattr(reading, "read_picture", read)
    write_photos(tmp_path, [(64, 48)] * count)
    keeper = Keeper()
    inputs = find_inputs([str(tmp_path)]).images
    summary = run(inputs, loaded, keeper, device_type="cuda", should_stop=lambda: len(begun) >= 2)
    assert len(begun) <= 2 + helper_threads("cuda")
    assert (summary.processed, summary.failed, summary.unfinished) == (len(begun), 0, count - len(begun))
    assert [r.input for r in keeper.results] == inputs
    assert {r.failure for r in keeper.results} == {None, "not processed (the run was stopped)."}


def test_a_lost_device_keeps_what_was_done_and_names_the_rest(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, [(64, 48)] * 4)
    predict_prepared = Predictor.predict_prepared
    calls = []

    def lose(self: Predictor, images: Sequence[Prepared]) -> list[ImageDetections | DeviceError]:
        calls.append(images)
        if len(calls) == 3:
            raise DeviceError("device cuda:0: failed (illegal memory access).")
        return predict_prepared(self, images)

    monkeypatch.setattr(Predictor, "predict_prepared", lose)
    keeper = Keeper()
    with pytest.raises(DeviceError, match="illegal"):
        run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert [r.failure is None for r in keeper.results] == [True, True, False, False]
    assert keeper.ending == "finished"


def test_a_defect_that_one_picture_brings_out_fails_that_picture_only(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, [(64, 48), (48, 64), (64, 48)])
    predict_prepared = Predictor.predict_prepared

    def fail(self: Predictor, images: Sequence[Prepared]) -> list[ImageDetections | DeviceError]:
        if any(image.size_hw[0] > image.size_hw[1] for image in images):
            raise RuntimeError("shape mismatch")
        return predict_prepared(self, images)

    monkeypatch.setattr(Predictor, "predict_prepared", fail)
    for device_type in ("cpu", "cuda"):
        keeper = Keeper()
        summary = run(find_inputs([str(tmp_path)]).images, loaded, keeper, device_type=device_type)
        assert (summary.processed, summary.failed) == (2, 1)
        assert "internal error: RuntimeError: shape mismatch" in (keeper.results[1].failure or "")


def test_an_output_that_fails_ends_the_run_and_abandons_every_sink(tmp_path: Path, loaded: LoadedModel) -> None:
    write_photos(tmp_path, [(64, 48)] * 3)

    def refuse(result: ImageResult) -> None:
        if result.image_id == 2:
            raise OutputError("out: not written (No space left on device).")

    keeper = Keeper(refuse)
    with pytest.raises(OutputError):
        run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert keeper.ending == "abandoned"
    assert [r.image_id for r in keeper.results] == [1]


def test_few_pictures_are_held_in_memory_at_once(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, [(64, 48)] * 20)
    opened: list[Path] = []

    def count(path: Path, **options: Any) -> Picture:
        opened.append(path)
        return read_picture(path, **options)

    monkeypatch.setattr("ddetr_cli.detect.reading.read_picture", count)
    threads = helper_threads("cpu")
    for keeper, most in ((Keeper(), threads), (Drawer(), 2 * threads)):
        opened.clear()
        ahead: list[int] = []
        keeper.on_add = lambda result, ahead=ahead: ahead.append(len(opened) - result.image_id)  # type: ignore[misc]
        run(find_inputs([str(tmp_path)]).images, loaded, keeper)
        assert max(ahead) <= most
        assert len(opened) == 20


def test_a_gpu_window_of_large_pictures_is_cut_by_their_memory(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, [(64, 48)] * 12)
    monkeypatch.setattr("ddetr_cli.detect.reading.WINDOW_BYTES", 5 * 3 * 4 * 64 * 85)  # of five prepared ones
    windows: list[int] = []
    predict_prepared = Predictor.predict_prepared

    def count(self: Predictor, images: Sequence[Prepared]) -> list[ImageDetections | DeviceError]:
        windows.append(len(images))
        return predict_prepared(self, images)

    monkeypatch.setattr(Predictor, "predict_prepared", count)
    keeper = Keeper()
    run(find_inputs([str(tmp_path)]).images, loaded, keeper, device_type="cuda")
    assert windows == [5, 5, 2]
    assert len(keeper.results) == 12


def test_pictures_are_drawn_and_handed_on_in_input_order_however_long_each_takes(
    tmp_path: Path, loaded: LoadedModel
) -> None:
    write_photos(tmp_path, [(64, 48), (48, 64), (64, 48), (48, 64)])
    (tmp_path / "1.png").write_bytes(b"not a picture")
    last_is_drawn = threading.Event()

    def wait(result: ImageResult) -> None:
        if result.input.name == "0.png":
            last_is_drawn.wait(60)
        elif result.input.name == "2.png":
            last_is_drawn.set()

    keeper = Drawer(wait)
    run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert keeper.files == [b"0.png RGB (64, 48)", None, b"2.png RGB (64, 48)", b"3.png RGB (48, 64)"]
    assert [r.input.name for r in keeper.results] == ["0.png", "1.png", "2.png", "3.png"]


def test_a_picture_that_cannot_be_drawn_ends_the_run_and_abandons_every_sink(
    tmp_path: Path, loaded: LoadedModel
) -> None:
    write_photos(tmp_path, [(64, 48)] * 4)

    def refuse(result: ImageResult) -> None:
        if result.image_id == 2:
            raise MemoryError

    keeper = Drawer(refuse)
    with pytest.raises(MemoryError):
        run(find_inputs([str(tmp_path)]).images, loaded, keeper)
    assert keeper.ending == "abandoned"
    assert [r.image_id for r in keeper.results] == [1]


@pytest.mark.parametrize("drawing", [False, True])
def test_the_model_sees_large_jpegs_reduced_and_what_draws_has_every_pixel(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, drawing: bool
) -> None:
    Image.effect_mandelbrot((800, 600), (-3, -2.5, 2, 2.5), 100).convert("RGB").save(tmp_path / "a.jpg")
    seen: list[tuple[int, int]] = []
    call = Preparation.__call__

    def note(self: Preparation, image: Image.Image, size_hw: tuple[int, int] | None = None) -> Prepared:
        seen.append(image.size)
        return call(self, image, size_hw)

    monkeypatch.setattr(Preparation, "__call__", note)
    drawn: list[tuple[int, int]] = []
    keeper = Drawer() if drawing else Keeper()
    if isinstance(keeper, Drawer):
        monkeypatch.setattr(keeper, "render", lambda _, picture: drawn.append(picture.size) or b"")
    inputs = find_inputs([str(tmp_path)]).images
    predictor = Predictor(loaded, device="cpu")
    detect_images(inputs, predictor, [keeper], selection=Selection(0.0), max_pixels=10**6, draft=True)
    assert seen == [(200, 150)]
    assert drawn == ([(800, 600)] if drawing else [])
    assert keeper.results[0].size_wh == (800, 600)


def test_classes_are_counted_the_most_frequent_first() -> None:
    summary = RunSummary(classes={0: 2, 2: 5, 1: 2})
    table = ClassTable((1, 2, 7), ("dog", "cat", None))
    assert class_counts(summary, table) == [("class 7", 5), ("cat", 2), ("dog", 2)]


@pytest.mark.slow
def test_memory_is_no_higher_after_500_images_than_after_50(tmp_path: Path, repository: Path) -> None:
    sources = sorted((repository / "examples" / "images").glob("*.jpg"))
    (tmp_path / "in").mkdir()
    for number in range(500):
        os.link(sources[number % len(sources)], tmp_path / "in" / f"{number:03d}.jpg")
    # A process of its own, and VmHWM: ru_maxrss counts what the process that started it had in memory.
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ddetr_cli.detect.run import detect_images\n"
        "from ddetr_cli.detect.selection import Selection\n"
        "from ddetr_cli.detect.sinks.assemble import make_sinks\n"
        "from ddetr_cli.detect.sinks.formats import FORMATS\n"
        "from ddetr_cli.detect.sources import find_inputs\n"
        "from ddetr_cli.inference.predictor import Predictor\n"
        "from ddetr_cli.weights import load_model\n"
        "loaded, out = load_model('demo'), Path(sys.argv[2])\n"
        "sinks = make_sinks(out, FORMATS, loaded.classes, {})\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "peaks = []\n"
        "detect_images(\n"
        "    find_inputs([sys.argv[1]]).images, Predictor(loaded, device='cpu'), sinks, selection=Selection(0.3),\n"
        "    max_pixels=10**7,\n"
        "    on_result=lambda _: peaks.append(peak()),\n"
        ")\n"
        "print(len(peaks), peaks[49], peaks[-1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "in"), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    count, after_50, after_500 = map(int, done.stdout.split())
    assert count == 500
    # KiB. A picture kept of each image, a megabyte, would make 450 MB; the allocator may settle a little.
    assert after_500 - after_50 < 24 * 1024
