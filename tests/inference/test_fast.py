"""The fast path against the model it is derived from."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddetr_cli.inference.fast import FastDetector, accelerate, best_precision
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DeformableDetr
from ddetr_cli.ops import native
from ddetr_cli.ops.dense import dense_engine
from ddetr_cli.presets import DEFORMABLE_DETR, PRESETS, ModelConfig, get_preset

PRESET_NAMES = [name for name, config in PRESETS.items() if config.family == DEFORMABLE_DETR]
# Fewer layers than the real ones: every kind of layer is there, and a test takes a second.
SMALL = {"encoder_layers": 2, "decoder_layers": 2, "queries": 20}


def lively_model(config: ModelConfig) -> DeformableDetr:
    """A model whose every part matters: heads, offsets and batch-norms away from where they start."""
    torch.manual_seed(0)
    model = build_detector(config).eval()
    assert isinstance(model, DeformableDetr)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_embed.0" in name or "_embed.1" in name or "_embed.2" in name:
                parameter.add_(torch.randn_like(parameter) * 0.03)
            elif "sampling_offsets.weight" in name or "attention_weights" in name:
                parameter.add_(torch.randn_like(parameter) * 0.01)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    return model


def fast(model: DeformableDetr, precision: str = "fp32") -> FastDetector:
    accelerated = accelerate(model, precision)
    if accelerated is None:
        pytest.skip(f"this processor has no {precision} engine")
    return accelerated


@pytest.fixture(scope="module")
def tiny() -> DeformableDetr:
    return lively_model(get_preset("tiny"))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 3, 97, 131)


@pytest.mark.usefixtures("require_native")
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_gives_the_numbers_of_the_model(name: str, pixels: Tensor) -> None:
    model = lively_model(get_preset(name, **SMALL))
    found = fast(model)(pixels)
    with torch.inference_mode():
        wanted = model(pixels)
    assert (found.logits - wanted.logits).abs().max() <= 1e-5
    assert (found.boxes_cxcywh - wanted.boxes_cxcywh).abs().max() <= 1e-5


@pytest.mark.usefixtures("require_native")
@pytest.mark.parametrize("name", [name for name in PRESET_NAMES if not PRESETS[name].two_stage])
def test_bf16_is_within_a_hundredth_of_the_largest_logit(name: str, pixels: Tensor) -> None:
    # In two-stage models a rounding may pick another proposal, and queries then have other places.
    model = lively_model(get_preset(name, **SMALL))
    found = fast(model, "bf16")(pixels)
    with torch.inference_mode():
        wanted = model(pixels)
    assert (found.logits - wanted.logits).abs().max() <= 0.01 * wanted.logits.abs().max()
    assert found.logits.dtype == found.boxes_cxcywh.dtype == torch.float32


@pytest.mark.usefixtures("require_native")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_has_the_same_bits_alone_among_others_and_again(tiny: DeformableDetr, precision: str) -> None:
    accelerated = fast(tiny, precision)
    torch.manual_seed(2)
    batch = torch.randn(3, 3, 96, 128)
    together = accelerated(batch)
    larger = torch.randn(1, 3, 160, 200)  # the workspace grows, and what was prepared is drawn up anew
    accelerated(larger)
    for i in range(3):
        alone = accelerated(batch[i : i + 1])
        assert torch.equal(alone.logits[0], together.logits[i])
        assert torch.equal(alone.boxes_cxcywh[0], together.boxes_cxcywh[i])


@pytest.mark.usefixtures("require_native")
def test_the_number_of_threads_does_not_change_a_result(tiny: DeformableDetr, pixels: Tensor) -> None:
    accelerated = fast(tiny)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(accelerated(pixels))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert (result.logits - results[0].logits).abs().max() <= 1e-5
        assert (result.boxes_cxcywh - results[0].boxes_cxcywh).abs().max() <= 1e-5


@pytest.mark.usefixtures("require_native")
def test_more_sizes_than_plans_are_kept_for_still_give_right_results(tiny: DeformableDetr) -> None:
    accelerated = fast(tiny)
    torch.manual_seed(3)
    images = [torch.randn(1, 3, 64 + 8 * i, 96) for i in range(10)]
    first = [accelerated(image).logits for image in images]
    assert all(torch.equal(accelerated(image).logits, logits) for image, logits in zip(images, first, strict=True))


@pytest.mark.usefixtures("require_native")
def test_a_padded_batch_is_computed_by_the_model_itself(tiny: DeformableDetr, pixels: Tensor) -> None:
    is_padding = torch.zeros(1, 97, 131, dtype=torch.bool)
    accelerated = fast(tiny)
    unpadded = accelerated(pixels, is_padding)
    is_padding[:, :, 100:] = True
    padded = accelerated(pixels, is_padding)
    with torch.inference_mode():
        wanted = tiny(pixels, is_padding)
    assert torch.equal(padded.logits, wanted.logits)
    assert not torch.equal(padded.logits, unpadded.logits)


@pytest.mark.usefixtures("require_native")
def test_it_is_a_snapshot_of_the_trunk_and_encoder(tiny: DeformableDetr, pixels: Tensor) -> None:
    model = copy.deepcopy(tiny)
    old = fast(model)
    before = old(pixels)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.1)
    assert torch.equal(old(pixels).logits, before.logits)
    with torch.inference_mode():
        wanted = model(pixels)
    assert (fast(model)(pixels).logits - wanted.logits).abs().max() <= 1e-5
    assert (wanted.logits - before.logits).abs().max() > 1e-3


@pytest.mark.usefixtures("require_native")
def test_a_nan_in_the_picture_ends_in_the_output(tiny: DeformableDetr, pixels: Tensor) -> None:
    broken = pixels.clone()
    broken[0, 0, 40, 60] = torch.nan
    assert fast(tiny)(broken).logits.isnan().any()


@pytest.mark.slow
@pytest.mark.usefixtures("require_native")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_packing_leaves_little_more_in_memory_than_what_it_packs() -> None:
    if dense_engine(torch.float32) is None:
        pytest.skip("this processor has none of the dense engines")
    code = """if True:
        import gc
        from ddetr_cli.inference.fast import accelerate
        from ddetr_cli.model.build import build_detector
        from ddetr_cli.ops.dense import Packed
        from ddetr_cli.presets import get_preset

        def resident():
            status = open("/proc/self/status").read()
            return int(status.partition("VmRSS:")[2].split()[0]) << 10

        model = build_detector(get_preset("r50"))
        before = resident()
        fast = accelerate(model)
        packed = [x.weights.nbytes for x in gc.get_objects() if isinstance(x, Packed)]
        print(resident() - before, sum(packed))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, packed = done.stdout.split()
    assert int(packed) > 100 << 20
    assert int(grown) < 1.5 * int(packed) + (64 << 20)  # a huge page is not always full


@pytest.mark.usefixtures("require_native")
@pytest.mark.parametrize("is_gain", [False, True])
def test_sixteen_bits_are_chosen_only_where_they_are_faster(
    is_gain: bool, tiny: DeformableDetr, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dense_engine(torch.bfloat16) is None:
        pytest.skip("this processor or this build multiplies no bfloat16")
    monkeypatch.setattr("ddetr_cli.inference.fast.detector.gains_by_bf16", lambda: is_gain)
    assert best_precision(tiny) == ("bf16" if is_gain else "fp32")


def test_without_native_kernels_there_is_no_fast_path(tiny: DeformableDetr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_kernels", lambda: None)
    assert accelerate(tiny) is None


@pytest.mark.parametrize(
    "config",
    [
        replace(get_preset("r50", **SMALL), hidden_dim=72, heads=8),
        replace(get_preset("tiny"), levels=5, two_stage=False, refine_boxes=False),
    ],
    ids=["a width of 72", "five levels"],
)
def test_a_model_the_kernels_do_not_fit_has_no_fast_path(config: ModelConfig) -> None:
    # 72 channels are not groups of 32 for its group norm: the width is only claimed.
    model = build_detector(replace(config, hidden_dim=64 if config.hidden_dim == 72 else config.hidden_dim))
    model.config = config
    assert accelerate(model) is None
