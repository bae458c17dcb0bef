"""The numbers that the released weights must give, wherever those weights are: $DDETR_WEIGHTS or a cache.

The golden values are those of transformers' own integration tests for its conversion of the authors' weights (image
39769 of COCO val2017, prepared with Pillow): the first three values of the first three queries, and what is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from ddetr_cli.data.pixels import network_size, to_pixels
from ddetr_cli.errors import CheckpointError
from ddetr_cli.model.postprocess import decode
from ddetr_cli.presets import HUB_IDS
from ddetr_cli.weights import LoadedModel, load_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from ddetr_cli.model.detector import DetectorOutput

TOLERANCE = 2e-4  # transformers' own, between machines


@dataclass(frozen=True)
class Found:
    """What scores above 0.3, best first, and one of its boxes in pixels."""

    scores: list[float]
    labels: list[int]
    boxed: int
    box_xyxy_px: list[float]


@dataclass(frozen=True)
class Golden:
    """Logits and boxes of the first three queries, (3,3) each."""

    logits: list[list[float]]
    boxes: list[list[float]]
    found: Found | None = None


GOLDEN = {
    "r50": Golden(
        [[-9.6645, -4.3449, -5.8705], [-9.7035, -3.8504, -5.0724], [-10.5634, -5.3379, -7.5116]],
        [[0.8693, 0.2289, 0.2492], [0.3150, 0.5489, 0.5845], [0.5563, 0.7580, 0.8518]],
        # Two cats, two remote controls and a couch.
        Found(
            [0.7999, 0.7895, 0.6332, 0.4719, 0.4382], [17, 17, 75, 75, 63], 0,
            [16.4960, 52.8387, 318.2565, 470.7831],
        ),
    ),
    "r50-single-scale": Golden(
        [[-9.9051, -4.2541, -6.4852], [-9.6947, -4.0854, -6.8033], [-10.0665, -5.8470, -7.7003]],
        [[0.7292, 0.4991, 0.5532], [0.7959, 0.2426, 0.4236], [0.7582, 0.3518, 0.4451]],
    ),
    "r50-single-scale-dc5": Golden(
        [[-8.9652, -4.1074, -5.6635], [-9.0596, -4.9447, -6.6075], [-10.1178, -4.5275, -6.2671]],
        [[0.7665, 0.4130, 0.4769], [0.8364, 0.1841, 0.3391], [0.6261, 0.3895, 0.7978]],
    ),
    "r50-refine": Golden(
        [[-8.8895, -5.4187, -6.8153], [-8.4706, -6.1668, -7.6184], [-9.0042, -5.5359, -6.9141]],
        [[0.7828, 0.2208, 0.4323], [0.0892, 0.5996, 0.1319], [0.5524, 0.6389, 0.8914]],
    ),
    "r50-two-stage": Golden(
        [[-6.7108, -4.3213, -6.3777], [-8.9014, -6.1799, -6.7240], [-6.9315, -4.4735, -6.2298]],
        [[0.2583, 0.5499, 0.4683], [0.7652, 0.9068, 0.4882], [0.5490, 0.2763, 0.0564]],
    ),
    "detr-r50": Golden(
        [[-19.1194, -0.0893, -11.0154], [-17.3640, -1.8035, -14.0219], [-20.0461, -0.5837, -11.1060]],
        [[0.4433, 0.5302, 0.8852], [0.5494, 0.2517, 0.0529], [0.4998, 0.5360, 0.9955]],
        Found(
            [0.9988, 0.9987, 0.9982, 0.9960, 0.9955], [17, 17, 75, 75, 63], 2,
            [40.1615, 70.8090, 175.5476, 117.9810],
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def picture(data_dir: Path) -> Image:
    """Two cats on a couch."""
    from PIL import Image

    with Image.open(data_dir / "photos" / "images" / "000000039769.png") as image:
        return image.convert("RGB")


def _released(preset: str, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """The released weights of a preset, or a skip that names it; nothing is downloaded."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    try:
        return load_model(preset)
    except CheckpointError as error:
        if "not found and not downloaded" in str(error):
            pytest.skip(f"the released weights of {preset} ({HUB_IDS[preset]}) are not on this machine")
        raise


@torch.inference_mode()
def _output(loaded: LoadedModel, picture: Image) -> DetectorOutput:
    pixels = to_pixels(picture, network_size(picture.width, picture.height, 800))
    output: DetectorOutput = loaded.model(pixels[None])
    return output


def _assert_golden(output: DetectorOutput, golden: Golden) -> None:
    for found, expected in ((output.logits, golden.logits), (output.boxes_cxcywh, golden.boxes)):
        torch.testing.assert_close(found[0, :3, :3], torch.tensor(expected), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("preset", list(GOLDEN))
def test_the_released_weights_give_the_published_numbers(
    preset: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = _released(preset, monkeypatch)  # first: what is skipped for want of weights is skipped by its name
    picture: Image = request.getfixturevalue("picture")
    output = _output(loaded, picture)
    _assert_golden(output, GOLDEN[preset])
    if (expected := GOLDEN[preset].found) is not None:
        (rows,) = decode(loaded.config.family, output, [(picture.height, picture.width)])
        kept = rows.scores > 0.3
        torch.testing.assert_close(rows.scores[kept], torch.tensor(expected.scores), rtol=0, atol=TOLERANCE)
        assert rows.labels[kept].tolist() == expected.labels
        box = torch.tensor(expected.box_xyxy_px)
        torch.testing.assert_close(rows.boxes_xyxy_px[expected.boxed], box, rtol=0, atol=0.05)  # pixels, of 640


class TestTheTestItself:
    """What can be known of the test above without the weights: that it runs on what is there, and can fail."""

    def test_without_weights_it_is_skipped_by_the_name_of_the_variant(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._only(tmp_path, monkeypatch)
        with pytest.raises(
            pytest.skip.Exception, match=r"the released weights of r50-refine \(SenseTime/deformable-"
        ):
            _released("r50-refine", monkeypatch)

    def test_damaged_weights_are_no_reason_to_skip(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._only(tmp_path, monkeypatch)
        (tmp_path / "r50.safetensors").write_bytes(b"<html>")
        with pytest.raises(CheckpointError, match="an HTML page"):
            _released("r50", monkeypatch)

    def test_weights_in_the_folder_are_read_and_other_numbers_fail(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from PIL import Image

        from ddetr_cli.classes import COCO_TABLE
        from ddetr_cli.model.build import build_detector
        from ddetr_cli.presets import get_preset
        from ddetr_cli.weights import save_checkpoint

        self._only(tmp_path, monkeypatch)
        torch.manual_seed(0)
        small = get_preset("r50-single-scale", encoder_layers=1, decoder_layers=1)
        save_checkpoint(tmp_path / "r50-single-scale.safetensors", build_detector(small), COCO_TABLE)
        output = _output(_released("r50-single-scale", monkeypatch), Image.new("RGB", (64, 8), "grey"))
        found = [first[0, :3, :3].tolist() for first in (output.logits, output.boxes_cxcywh)]
        _assert_golden(output, Golden(*found))
        found[1][2][2] += 1.1 * TOLERANCE
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            _assert_golden(output, Golden(*found))

    def _only(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No cache but ``folder``."""
        from huggingface_hub import constants

        monkeypatch.setenv("DDETR_WEIGHTS", str(folder))
        monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
