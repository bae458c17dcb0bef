"""Faster R-CNN against torchvision's own, from the picture to the boxes, with shared random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ddetr_cli.classes import COCO_TABLE
from ddetr_cli.inference.predictor import Predictor
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DetectionModel
from ddetr_cli.presets import PRESETS, get_preset
from ddetr_cli.weights import LoadedModel, LoadReport


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    """Random weights under which something is found: untrained heads score all classes below the threshold."""
    torch.manual_seed(0)
    ours = build_detector(PRESETS["fasterrcnn-r50-fpn"]).eval()
    for name, tensor in ours.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    torch.nn.init.normal_(ours.get_parameter("roi_heads.box_predictor.cls_score.weight"), std=0.5)
    return ours


def _loaded(model: DetectionModel) -> LoadedModel:
    report = LoadReport(Path("x.pth"), "torchvision", "fasterrcnn-r50-fpn", len(model.state_dict()))
    return LoadedModel(model, model.config, COCO_TABLE, report, Path("x.pth"), "0" * 64)


def _picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def test_parameters_are_those_torchvision_publishes(model: DetectionModel):
    meta = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"] == 41_755_286
    # The stem and the first stage, as of the other systems' trunk.
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 222_400


@pytest.mark.parametrize(("width", "height"), [(160, 120), (90, 130), (400, 60)])
def test_a_prediction_equals_torchvisions_own_from_picture_to_boxes(
    model: DetectionModel, width: int, height: int, monkeypatch: pytest.MonkeyPatch
):
    detection = torchvision.models.detection
    # Its released weights stand for ours here, so that torchvision does to the model what it does for them.
    monkeypatch.setattr(
        detection.FasterRCNN_ResNet50_FPN_Weights, "get_state_dict", lambda *_, **__: model.state_dict()
    )
    theirs = detection.fasterrcnn_resnet50_fpn(weights="COCO_V1", min_size=128, max_size=128 * 1333 // 800).eval()
    picture = _picture(width, height)
    with torch.inference_mode():
        (expected,) = theirs([torchvision.transforms.functional.to_tensor(picture)])
    found = Predictor(_loaded(model), device="cpu", image_size=128).predict([picture])[0]
    assert len(expected["scores"]) > 5
    assert torch.equal(found.labels, expected["labels"])
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-5)
    # float32 of coordinates up to 400 px
    torch.testing.assert_close(found.boxes_xyxy_px, expected["boxes"], rtol=0, atol=1e-3)


def test_a_model_built_without_memory_and_filled_from_a_file_finds_the_same(model: DetectionModel):
    with torch.device("meta"):
        filled = build_detector(model.config).eval()
    filled.load_state_dict(model.state_dict(), assign=True)
    pixels = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        expected, found = model(pixels), filled(pixels)
    assert torch.equal(found.scores[0], expected.scores[0])
    assert torch.equal(found.boxes_xyxy[0], expected.boxes_xyxy[0])


def test_padding_is_not_searched_and_does_not_move_boxes(model: DetectionModel):
    pixels = torch.randn(1, 3, 96, 128)
    padded = torch.nn.functional.pad(pixels, (0, 64, 0, 32))
    is_padding = torch.ones(1, 128, 192, dtype=torch.bool)
    is_padding[:, :96, :128] = False
    with torch.inference_mode():
        alone, inside = model(pixels), model(padded, is_padding)
    assert len(alone.scores[0]) > 5
    assert float(inside.boxes_xyxy[0].min()) >= 0
    assert float(inside.boxes_xyxy[0].max()) <= 1
    # The pyramid sees zeros beyond the picture either way; its best find is the same.
    torch.testing.assert_close(inside.scores[0][0], alone.scores[0][0], rtol=0, atol=1e-4)


def test_other_classes_and_fewer_detections_can_be_asked_for():
    config = get_preset("fasterrcnn-r50-fpn", classes=4, queries=7)
    with torch.device("meta"):
        model = build_detector(config)
    assert model.get_parameter("roi_heads.box_predictor.cls_score.weight").shape[0] == 4
    assert model.get_submodule("roi_heads").detections_per_img == 7


def test_torchvision_is_imported_for_faster_rcnn_only():
    program = (
        "import sys, torch\n"
        "from ddetr_cli.inference.predictor import Predictor\n"
        "from ddetr_cli.model.build import build_detector\n"
        "from ddetr_cli.presets import FASTER_RCNN, PRESETS\n"
        "with torch.device('meta'):\n"
        "    for config in PRESETS.values():\n"
        "        if config.family != FASTER_RCNN: build_detector(config)\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
