"""Inference by graphs, and the derived model they hold: the same numbers as the model; graphs without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ddetr_cli.errors import UsageError
from ddetr_cli.inference import graphs
from ddetr_cli.inference.derived import DerivedDetector, can_derive
from ddetr_cli.inference.graphs import GraphDetector, Run, accelerate_on_gpu
from ddetr_cli.model.detector import DeformableDetr, DetectorOutput, build_detector
from ddetr_cli.presets import get_preset

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
    ],
)
def test_in_fp32_the_derived_model_gives_what_the_model_gives(preset: str, changes: dict[str, object]) -> None:
    model = small_model(preset, **changes)
    derived = DerivedDetector(model, torch.float32)
    for size in ((64, 96), (96, 65), (64, 96)):
        with torch.inference_mode():
            expected = model(pictures(*size), None)
        found = derived(pictures(*size))
        torch.testing.assert_close(found.boxes_cxcywh, expected.boxes_cxcywh, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)


def test_in_bf16_it_stays_near_the_model_and_its_geometry_wide() -> None:
    model = small_model(backbone="resnet-tiny")
    found = DerivedDetector(model, torch.bfloat16)(pictures())
    with torch.inference_mode():
        expected = model(pictures(), None)
    assert found.logits.dtype == found.boxes_cxcywh.dtype == torch.float32
    assert (
        found.boxes_cxcywh - expected.boxes_cxcywh
    ).abs().mean() <= 0.02  # 8 bits through 4 layers, of random weights


def test_the_model_itself_is_left_as_it_was() -> None:
    model = small_model(backbone="resnet-tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    DerivedDetector(model, torch.bfloat16)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_models_of_two_stages_and_of_other_families_are_not_derived() -> None:
    assert can_derive(small_model(backbone="resnet-tiny"))
    assert not can_derive(build_detector(get_preset("tiny", **SMALL)))
    assert not can_derive(torch.nn.Linear(2, 2))


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
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_on_a_gpu_a_replayed_graph_gives_what_the_model_gives(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDETR_CUDA_INFERENCE", "fast")
    model = small_model("r50").cuda()
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
