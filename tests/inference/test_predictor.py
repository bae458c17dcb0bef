from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.data.pixels import network_size, to_pixels
from ddetr_cli.errors import DeviceError, UsageError
from ddetr_cli.inference.detections import ImageDetections
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DetectorOutput
from ddetr_cli.presets import get_preset
from ddetr_cli.weights import LoadedModel


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def assert_identical(a: ImageDetections, b: ImageDetections) -> None:
    assert torch.equal(a.scores, b.scores)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.boxes_xyxy_px, b.boxes_xyxy_px)


class Recorder(torch.nn.Module):
    """Stands for a model: notes the shape of every batch, and does to each what ``act`` says."""

    def __init__(self, act: object = None) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.act = act

    def forward(self, pixels: torch.Tensor, is_padding: torch.Tensor | None) -> DetectorOutput:
        self.shapes.append(tuple(pixels.shape))
        assert is_padding is None
        if callable(self.act):
            self.act(pixels)
        B = pixels.shape[0]
        # The first pixel's value marks the image, so that a mix-up of results shows.
        logits = pixels[:, :1, :1, :1].reshape(B, 1, 1).expand(B, 4, 3)
        return DetectorOutput(logits, torch.full((B, 4, 4), 0.5))


def with_model(loaded: LoadedModel, model: torch.nn.Module) -> LoadedModel:
    return LoadedModel(model, loaded.config, loaded.classes, loaded.report, loaded.source, loaded.sha256)  # type: ignore[arg-type]


def test_every_query_and_class_pair_up_to_a_hundred_comes_back_best_first(loaded: LoadedModel) -> None:
    found = Predictor(loaded, device="cpu").predict([noise(90, 60)])[0]
    assert found.scores.shape == (100,)  # 40 queries x 3 classes = 120
    assert found.boxes_xyxy_px.shape == (100, 4)
    assert found.labels.shape == (100,)
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    assert set(found.labels.tolist()) <= {0, 1, 2}


def test_a_prediction_is_the_models_output_scaled_to_the_picture_and_not_clipped(loaded: LoadedModel) -> None:
    picture = noise(90, 60)
    found = Predictor(loaded, device="cpu", precision="fp32").predict([picture])[0]
    pixels = to_pixels(picture, network_size(90, 60, 64))[None]
    with torch.inference_mode():
        out = loaded.model(pixels, torch.zeros(1, *pixels.shape[2:], dtype=torch.bool))
    best = out.logits[0].sigmoid().max()
    assert float(found.scores[0]) == pytest.approx(float(best), abs=1e-5)  # the fast path sums in another order
    query = int((out.logits[0].sigmoid() == best).nonzero()[0, 0])
    cx, cy, w, h = out.boxes_cxcywh[0, query].tolist()
    expected = [(cx - w / 2) * 90, (cy - h / 2) * 60, (cx + w / 2) * 90, (cy + h / 2) * 60]
    assert found.boxes_xyxy_px[0].tolist() == pytest.approx(expected, abs=1e-3)  # float32 of a 90 px coordinate


def test_on_the_cpu_a_result_is_bit_identical_whatever_the_neighbours_and_the_batch_size(loaded: LoadedModel) -> None:
    pictures = [noise(90, 60, 1), noise(60, 90, 2), noise(90, 60, 3), noise(33, 33, 4), noise(90, 60, 5)]
    alone = [Predictor(loaded, device="cpu", batch_size=1).predict([picture])[0] for picture in pictures]
    for batch_size in (2, 8):
        together = Predictor(loaded, device="cpu", batch_size=batch_size).predict(pictures)
        for a, b in zip(alone, together, strict=True):
            assert_identical(a, b)
    for a, b in zip(alone, reversed(Predictor(loaded, device="cpu").predict(pictures[::-1])), strict=True):
        assert_identical(a, b)


def test_only_images_of_one_network_size_share_a_batch_and_results_keep_their_order(loaded: LoadedModel) -> None:
    model = Recorder()
    predictor = Predictor(with_model(loaded, model), device="cpu")
    predictor.batch_size = 2  # as on a GPU
    pictures = [
        Image.new("RGB", size, (value, 0, 0)) for value, size in enumerate([(64, 64), (96, 64)] * 3, start=10)
    ]
    found = predictor.predict(pictures)
    assert model.shapes == [(2, 3, 64, 64), (1, 3, 64, 64), (2, 3, 64, 96), (1, 3, 64, 96)]
    firsts = [float(one.scores[0]) for one in found]
    assert firsts == sorted(firsts)
    assert len(set(firsts)) == 6


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2000), (2000, 1), (6000, 40)])
def test_pictures_of_odd_sizes_are_predicted(loaded: LoadedModel, size: tuple[int, int]) -> None:
    found = Predictor(loaded, device="cpu").predict([Image.new("RGB", size, "grey")])[0]
    assert len(found.scores) > 0
    assert found.dropped == 0


def test_pictures_prepared_beforehand_on_other_threads_give_the_same(loaded: LoadedModel) -> None:
    predictor = Predictor(loaded, device="cpu")
    pictures = [noise(90, 60, 1), noise(60, 90, 2), noise(90, 60, 3)]
    with ThreadPoolExecutor(2) as pool:
        prepared = list(pool.map(predictor.prepare, pictures))
    assert [one.size_hw for one in prepared] == [(60, 90), (90, 60), (60, 90)]
    for a, b in zip(predictor.predict_prepared(prepared), predictor.predict(pictures), strict=True):
        assert isinstance(a, ImageDetections)
        assert_identical(a, b)


def test_pictures_are_prepared_by_the_rule_asked_for(loaded: LoadedModel) -> None:
    model = Recorder()
    for preprocess in ("original", "hf"):
        Predictor(with_model(loaded, model), device="cpu", image_size=48, preprocess=preprocess).predict(
            [noise(1000, 100)]
        )
    # 48 * 1333 / 800 = 79.98, truncated to 79; short side round(7.9) = 8, long side 80, or 79 from the unrounded.
    assert model.shapes == [(1, 3, 8, 80), (1, 3, 8, 79)]


def test_a_model_of_the_detr_family_answers_once_per_query(loaded: LoadedModel) -> None:
    config = get_preset(
        "detr-r50", backbone="resnet-tiny", hidden_dim=32, heads=2, encoder_layers=1, decoder_layers=1, queries=40,
        classes=3, image_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    detr = LoadedModel(build_detector(config), config, loaded.classes, loaded.report, loaded.source, loaded.sha256)
    found = Predictor(detr, device="cpu").predict([noise(90, 60)])[0]
    assert found.scores.shape == found.labels.shape == (40,)
    assert set(found.labels.tolist()) <= {0, 1, 2}
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)


def test_an_empty_list_gives_an_empty_list(loaded: LoadedModel) -> None:
    assert Predictor(loaded, device="cpu").predict([]) == []


def test_rows_that_are_not_finite_are_dropped_and_counted(loaded: LoadedModel) -> None:
    class Broken(torch.nn.Module):
        def forward(self, pixels: torch.Tensor, is_padding: torch.Tensor | None) -> DetectorOutput:
            logits = torch.tensor([[[float("nan"), 1.0, 2.0], [3.0, 4.0, 5.0]]])
            boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, float("inf"), 0.2, 0.2]]])
            return DetectorOutput(logits, boxes)

    found = Predictor(with_model(loaded, Broken()), device="cpu").predict([noise(64, 64)])[0]
    assert found.dropped == 4  # one NaN score, three rows of the query with the infinite box
    assert found.labels.tolist() == [2, 1]
    assert found.scores.isfinite().all()
    assert found.boxes_xyxy_px.isfinite().all()


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("... can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    torch.AcceleratorError("CUDA error: out of memory\nCompile with ..."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_running_out_of_memory_halves_the_batch_and_says_so_once(loaded: LoadedModel, error: Exception) -> None:
    def at_most_two(pixels: torch.Tensor) -> None:
        if len(pixels) > 2:
            raise error

    model = Recorder(at_most_two)
    notices: list[str] = []
    predictor = Predictor(with_model(loaded, model), device="cpu", on_notice=notices.append)
    predictor.batch_size = 8
    found = predictor.predict([Image.new("RGB", (64, 64), (value, 0, 0)) for value in range(8)])
    assert [shape[0] for shape in model.shapes] == [8, 4, 2, 2, 2, 2]
    assert predictor.batch_size == 2
    assert len(notices) == 1
    assert "out of memory with a batch of 8" in notices[0]
    firsts = [float(one.scores[0]) for one in found]
    assert firsts == sorted(firsts)
    assert len(set(firsts)) == 8


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_an_image_too_large_even_alone_fails_by_itself(loaded: LoadedModel, error: Exception) -> None:
    def not_wide(pixels: torch.Tensor) -> None:
        if pixels.shape[3] > 64:
            raise error

    predictor = Predictor(with_model(loaded, Recorder(not_wide)), device="cpu")
    pictures = [noise(64, 64), noise(96, 64), noise(64, 64)]
    outcomes = predictor.predict_each(pictures)
    assert isinstance(outcomes[1], DeviceError)
    assert "one image at 96x64" in str(outcomes[1])
    assert isinstance(outcomes[0], ImageDetections)
    assert isinstance(outcomes[2], ImageDetections)
    with pytest.raises(DeviceError, match="out of memory"):
        predictor.predict(pictures)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( ... )`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_lost_device_is_a_device_error_and_not_one_failed_image(loaded: LoadedModel, error: RuntimeError) -> None:
    def lose(pixels: torch.Tensor) -> None:
        raise error

    with pytest.raises(DeviceError, match=r"device cpu: failed \((CUDA|cuDNN) error: [^\n]*\). Run again, or use"):
        Predictor(with_model(loaded, Recorder(lose)), device="cpu").predict_each([noise(64, 64)])


def test_the_message_of_memory_that_ran_out_tells_how_much_is_free(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(pixels: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    predictor = Predictor(with_model(loaded, Recorder()), device="cpu")
    monkeypatch.setattr(predictor, "forward", run_out)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 20, 81_000 << 20))
    predictor.device = torch.device("cuda", 0)
    (found,) = predictor.predict_each([noise(64, 64)])
    assert "cuda:0: out of memory (one image at 64x64, 3 of 81000 MiB free)" in str(found)


def test_a_defect_of_the_model_is_not_taken_for_lack_of_memory(loaded: LoadedModel) -> None:
    def fail(pixels: torch.Tensor) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        Predictor(with_model(loaded, Recorder(fail)), device="cpu").predict([noise(64, 64)])


def test_image_size_is_the_short_side_and_the_long_side_is_capped_at_1333_of_800(loaded: LoadedModel) -> None:
    model = Recorder()
    Predictor(with_model(loaded, model), device="cpu", image_size=48).predict([noise(96, 96), noise(1000, 100)])
    # 48 * 1333 / 800 = 79.98, truncated to 79; short side round(79 / 10) = 8, long side 80.
    assert model.shapes == [(1, 3, 48, 48), (1, 3, 8, 80)]


def test_the_checkpoints_own_image_size_is_the_default(loaded: LoadedModel) -> None:
    assert Predictor(loaded, device="cpu").image_size == 64


@pytest.mark.parametrize("best", ["fp32", "bf16"])
def test_auto_precision_is_what_the_processor_is_good_at(
    loaded: LoadedModel, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddetr_cli.inference.predictor.best_precision", lambda model: best)
    assert Predictor(loaded, device="cpu").precision == best


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_precision_gives_fp32_results_close_to_fp32s(loaded: LoadedModel, precision: str) -> None:
    picture = noise(90, 60)
    exact = Predictor(loaded, device="cpu", precision="fp32").predict([picture])[0]
    found = Predictor(loaded, device="cpu", precision=precision).predict([picture])[0]
    assert found.scores.dtype == found.boxes_xyxy_px.dtype == torch.float32
    assert found.dropped == 0
    # bf16 keeps 8 bits: two or three percent of a score of a few layers is what rounding alone can do.
    assert float(found.scores[0]) == pytest.approx(float(exact.scores[0]), abs=0.05)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "int8"}, "precision 'int8'"),
        ({"batch_size": 0}, "batch size 0"),
        ({"image_size": 0}, "image size 0"),
        ({"image_size": 10**6}, "image size 1000000"),
    ],
)
def test_an_impossible_option_is_a_usage_error(loaded: LoadedModel, options: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Predictor(loaded, device="cpu", **options)  # type: ignore[arg-type]


def test_no_gradients_are_kept(loaded: LoadedModel) -> None:
    found = Predictor(loaded, device="cpu").predict([noise(64, 64)])[0]
    assert not found.scores.requires_grad
    assert not found.boxes_xyxy_px.requires_grad


def test_a_pass_on_the_gpu_agrees_with_the_cpu(loaded: LoadedModel) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    pictures = [noise(90, 60, seed) for seed in range(5)]
    here = Predictor(loaded, device="cpu").predict(pictures)
    there = Predictor(loaded, device="cuda", batch_size=2).predict(pictures)
    loaded.model.cpu()
    for a, b in zip(here, there, strict=True):
        # 1e-2 is what Hugging Face allows between the two on this model (SPEC 12).
        assert torch.allclose(a.scores, b.scores, atol=1e-2)
