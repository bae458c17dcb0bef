"""Inference by graphs, and the derived model they hold: the same numbers as the model; graphs without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddetr_cli.data.images import read_image
from ddetr_cli.errors import UsageError
from ddetr_cli.inference import graphs
from ddetr_cli.inference.derived import DerivedDetector, can_derive
from ddetr_cli.inference.graphs import GraphDetector, Run, accelerate_on_gpu
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DeformableDetr, DetectorOutput
from ddetr_cli.model.postprocess import decode
from ddetr_cli.presets import DEFORMABLE_DETR, get_preset
from ddetr_cli.weights import load_model

SMALL = {
    "hidden_dim": 64,
    "heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "ffn_dim": 32,
    "queries": 40,
    "classes": 3,
}


def small_model(preset: str = "r50-refine", **changes: object) -> DeformableDetr:
    """Random weights; heads that give every query an answer of its own, batch-norms that do something."""
    torch.manual_seed(0)
    model = build_detector(get_preset(preset, **{**SMALL, **changes})).eval()
    assert isinstance(model, DeformableDetr)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "bn" in name or "downsample.1" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5) if tensor.dtype.is_floating_point else None
        elif name.startswith(("class_embed", "bbox_embed")) or "sampling_offsets" in name:
            torch.nn.init.normal_(tensor, std=0.2)
    return model


def pictures(height: int = 64, width: int = 96, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("r50", {}),
        ("r50", {"backbone": "resnet-tiny"}),
        ("r50-refine", {"backbone": "resnet-tiny"}),
        ("r50-single-scale", {}),
        ("r50-single-scale-dc5", {}),
        ("r50-two-stage", {}),
        ("tiny", {"queries": 300}),  # more than there are positions
    ],
)
def test_in_fp32_the_derived_model_gives_what_the_model_gives(preset: str, changes: dict[str, object]) -> None:
    model = small_model(preset, **changes)
    derived = DerivedDetector(model, torch.float32)
    for size in ((64, 96), (96, 65), (64, 96)):
        with torch.inference_mode():
            expected = model(pictures(*size), None)
        found = derived(pictures(*size))
        # Logits of up to 5; the largest differences seen are 7e-6 and 2e-5.
        torch.testing.assert_close(found.boxes_cxcywh, expected.boxes_cxcywh, rtol=0, atol=3e-5)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_in_16_bits_it_stays_near_the_model_and_its_geometry_wide(dtype: torch.dtype, most: float) -> None:
    model = small_model(backbone="resnet-tiny")
    found = DerivedDetector(model, dtype)(pictures())
    with torch.inference_mode():
        expected = model(pictures(), None)
    assert found.logits.dtype == found.boxes_cxcywh.dtype == torch.float32
    # 8 or 11 bits through 4 layers of random weights: 9e-4 and 1e-4 were seen.
    assert (found.boxes_cxcywh - expected.boxes_cxcywh).abs().mean() <= most


@pytest.mark.parametrize(
    ("dtype", "score", "pixels"),
    [(torch.float32, 1e-4, 1e-2), (torch.float16, 2e-2, 1.0), (torch.bfloat16, 4e-2, 4.0)],
)
def test_of_two_stages_the_demo_finds_what_the_model_finds(
    dtype: torch.dtype, score: float, pixels: float, repository: Path
) -> None:
    loaded = load_model("demo")
    predictor = Predictor(loaded, device="cpu", precision="fp32")
    assert isinstance(loaded.model, DeformableDetr)
    derived = DerivedDetector(loaded.model, dtype)
    for path in sorted((repository / "examples" / "images").glob("*.jpg"))[:2]:
        picture = predictor.prepare(read_image(path))
        with torch.inference_mode():
            plain = loaded.model(picture.pixels[None], None)
        (expected,), (found,) = (
            decode(DEFORMABLE_DETR, output, [picture.size_hw]) for output in (plain, derived(picture.pixels[None]))
        )
        count = int((expected.scores > 0.5).sum())
        assert count >= 2
        assert sorted(found.labels[:count].tolist()) == sorted(expected.labels[:count].tolist())
        for i in range(count):
            distance = (found.boxes_xyxy_px[:count] - expected.boxes_xyxy_px[i]).abs().amax(1)
            nearest = int(distance.argmin())
            assert distance[nearest] <= pixels
            assert found.labels[nearest] == expected.labels[i]
            assert abs(float(found.scores[nearest] - expected.scores[i])) <= score


def test_the_model_itself_is_left_as_it_was() -> None:
    model = small_model(backbone="resnet-tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    DerivedDetector(model, torch.bfloat16)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_models_of_other_families_are_not_derived() -> None:
    assert can_derive(small_model(backbone="resnet-tiny"))
    assert not can_derive(build_detector(get_preset("detr-tiny")))


@dataclass
class Recorded:
    """A graph as the CPU can have one: it runs anew, in the memory of the first run."""

    pixels: Tensor
    output: DetectorOutput
    run: Run

    def replay(self) -> None:
        found = self.run(self.pixels)
        self.output.logits.copy_(found.logits)
        self.output.boxes_cxcywh.copy_(found.boxes_cxcywh)


@pytest.fixture
def captures() -> list[torch.Size]:
    return []


@pytest.fixture
def detector(captures: list[torch.Size]) -> GraphDetector:
    def run(pixels: Tensor) -> DetectorOutput:
        return DetectorOutput(pixels.mean((2, 3))[:, None], pixels.amax((2, 3))[:, None])

    def capture(run: Run, pixels: Tensor) -> Recorded:
        captures.append(pixels.shape)
        kept = pixels.clone()
        return Recorded(kept, run(kept), run)

    return GraphDetector(run, capture)


def test_a_shape_is_captured_when_it_comes_again(detector: GraphDetector, captures: list[torch.Size]) -> None:
    for count in (1, 1, 2, 1, 2, 2):
        detector(pictures(8, 8, count))
    assert captures == [(1, 3, 8, 8), (2, 3, 8, 8)]


def test_every_run_sees_its_own_pixels_and_its_results_stay(detector: GraphDetector) -> None:
    given = [pictures(8, 8) * factor for factor in range(1, 5)]
    results = [detector(pixels) for pixels in given]
    for pixels, result in zip(given, results, strict=True):
        assert torch.equal(result.logits, pixels.mean((2, 3))[:, None])


def test_the_shapes_used_longest_ago_are_let_go(detector: GraphDetector, captures: list[torch.Size]) -> None:
    first = pictures(8, 8)
    for _ in range(2):
        detector(first)
    for width in range(9, 9 + graphs.MOST_GRAPHS):
        detector(pictures(8, width))
    assert len(captures) == 1
    detector(first)
    detector(first)
    assert captures == [first.shape, first.shape]


def test_it_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDETR_CUDA_INFERENCE", raising=False)
    assert accelerate_on_gpu(small_model(backbone="resnet-tiny"), "fp16") is None
    monkeypatch.setenv("DDETR_CUDA_INFERENCE", "fast")
    assert accelerate_on_gpu(torch.nn.Linear(2, 2), "fp16") is None
    assert isinstance(accelerate_on_gpu(small_model(backbone="resnet-tiny"), "bf16"), GraphDetector)
    monkeypatch.setenv("DDETR_CUDA_INFERENCE", "yes")
    with pytest.raises(UsageError, match="DDETR_CUDA_INFERENCE=yes: unknown"):
        accelerate_on_gpu(small_model(backbone="resnet-tiny"), "bf16")


@pytest.mark.usefixtures("require_cuda")
@pytest.mark.parametrize(
    ("preset", "precision"), [("r50", "fp32"), ("r50", "fp16"), ("r50", "bf16"), ("r50-two-stage", "fp32")]
)
def test_on_a_gpu_a_replayed_graph_gives_what_the_model_gives(
    preset: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDETR_CUDA_INFERENCE", "fast")
    model = small_model(preset).cuda()
    fast = accelerate_on_gpu(model, precision)
    assert fast is not None
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for scale in (1.0, 0.5, 2.0):
        pixels = pictures(128, 160).cuda() * scale
        with torch.inference_mode():
            expected = model(pixels, None)
        found = fast(pixels)
        error = (found.boxes_cxcywh - expected.boxes_cxcywh).abs().mean()
        assert error <= {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}[precision]
