"""Models written for others: bit for bit there and back, and computed alike by those they are for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr_cli.classes import COCO_TABLE, ClassTable
from ddetr_cli.errors import OutputError, UsageError
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import DETR, FASTER_RCNN, PRESETS, ModelConfig
from ddetr_cli.weights import LoadedModel, LoadReport, load_model
from ddetr_cli.weights.export import export_model

SEVEN = [name for name in PRESETS if name != "fasterrcnn-r50-fpn" and "tiny" not in name]
OTHERS = ClassTable((3, 70, 9), ("cat", "blue, or green", None))


def _small(preset: str, **changes: Any) -> ModelConfig:
    """The structure of a preset with few and narrow layers, on the whole trunk."""
    return replace(
        PRESETS[preset], hidden_dim=64, encoder_layers=2, decoder_layers=2, ffn_dim=64, queries=20, **changes
    )


def _loaded(config: ModelConfig, classes: ClassTable = COCO_TABLE) -> LoadedModel:
    """A model with random weights that all differ, as if it had been read from a file."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    model = build_detector(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.add_(noise if name.endswith("running_var") else (noise - 0.5) * (0.2 if tensor.dim() > 1 else 0.4))
    report = LoadReport(Path("random.safetensors"), "ddetr", config.preset, len(model.state_dict()))
    return LoadedModel(model, config, classes, report, report.source, "0" * 64)


def _unequal(a: LoadedModel, b: LoadedModel) -> list[str]:
    """Names of tensors that are not the same in both, to the bit."""
    first, second = a.model.state_dict(), b.model.state_dict()
    both = first.keys() & second.keys()
    return [*(first.keys() ^ second.keys()), *(name for name in both if not torch.equal(first[name], second[name]))]


@pytest.mark.parametrize("preset", SEVEN)
def test_from_the_authors_to_ours_to_hugging_face_to_ours_no_bit_changes(preset: str, tmp_path: Path):
    origin = given = _loaded(_small(preset))
    for to in ("authors", "ddetr", "huggingface"):
        export_model(given, to, tmp_path / to)
        given = load_model(str(tmp_path / to))
        assert _unequal(given, origin) == []
        # A small model has no preset's name once its own file is gone.
        assert replace(given.config, preset=preset) == origin.config
        assert given.classes == COCO_TABLE


@pytest.mark.parametrize("to", ["huggingface", "authors", "ddetr"])
@pytest.mark.parametrize("preset", ["r50", "detr-r50"])
def test_classes_of_any_data_set_come_back_with_their_ids(preset: str, to: str, tmp_path: Path):
    export_model(_loaded(_small(preset, classes=3, image_size=640), OTHERS), to, tmp_path / "out")
    loaded = load_model(str(tmp_path / "out"))
    assert loaded.classes == OTHERS
    assert loaded.config.image_size == 640


def test_the_authors_file_is_read_by_torchs_restricted_reader_and_holds_every_copy(tmp_path: Path):
    config = _small("r50-two-stage")
    (path,) = export_model(_loaded(config), "authors", tmp_path / "out.pth")
    stored = torch.load(path, weights_only=True)
    heads = [name for name in stored["model"] if "bbox_embed.2.layers.0.weight" in name]
    assert heads == ["bbox_embed.2.layers.0.weight", "transformer.decoder.bbox_embed.2.layers.0.weight"]
    assert stored["args"]["two_stage"] and stored["args"]["with_box_refine"]
    assert stored["args"]["num_feature_levels"] == 4


class TestTransformers:
    """transformers' own classes on our folders."""

    @pytest.fixture(autouse=True)
    def _transformers(self) -> None:
        self.library = pytest.importorskip(
            "transformers", reason="transformers, for which these files are, is not installed"
        )
        pytest.importorskip("timm", reason="timm, from which transformers takes the trunk, is not installed")

    @pytest.mark.parametrize("preset", SEVEN)
    def test_it_loads_every_tensor_and_computes_the_same(self, preset: str, tmp_path: Path):
        ours = _loaded(_small(preset))
        export_model(ours, "huggingface", tmp_path / "out")
        name = "DetrForObjectDetection" if ours.config.family == DETR else "DeformableDetrForObjectDetection"
        theirs, told = getattr(self.library, name).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert {kind: list(found) for kind, found in told.items() if found} == {}
        pixels = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected, found = theirs.eval()(pixel_values=pixels), ours.model(pixels)
        assert float(expected.logits.std()) > 0.05
        # float32 summed in another order
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.boxes_cxcywh, expected.pred_boxes, rtol=0, atol=1e-5)

    def test_its_labels_are_the_class_table(self, tmp_path: Path):
        export_model(_loaded(_small("r50", classes=3), OTHERS), "huggingface", tmp_path / "out")
        config = self.library.AutoConfig.from_pretrained(tmp_path / "out")
        assert config.id2label == {0: "cat", 1: "blue, or green", 2: "N/A"}
        assert config.num_labels == 3

    @pytest.mark.parametrize("preset", ["r50", "detr-r50"])
    def test_its_image_processor_makes_pictures_of_the_models_size(self, preset: str, tmp_path: Path):
        from PIL import Image

        export_model(_loaded(_small(preset, image_size=400)), "huggingface", tmp_path / "out")
        processor = self.library.AutoImageProcessor.from_pretrained(tmp_path / "out")
        pixels = processor(images=Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"]
        assert tuple(pixels.shape) == (1, 3, 400, 533)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(pixels[0, :, 0, 0], -mean / std)


class TestFasterRcnn:
    @pytest.fixture
    def loaded(self) -> LoadedModel:
        config = PRESETS["fasterrcnn-r50-fpn"]
        model = build_detector(config).eval()
        report = LoadReport(Path("x.pth"), "torchvision", config.preset, len(model.state_dict()))
        return LoadedModel(model, config, COCO_TABLE, report, report.source, "0" * 64)

    def test_its_file_is_the_one_torchvision_loads(self, loaded: LoadedModel, tmp_path: Path):
        detection = pytest.importorskip("torchvision.models.detection")
        from torchvision.ops.misc import FrozenBatchNorm2d

        (path,) = export_model(loaded, "authors", tmp_path / "out.pth")
        model = detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, norm_layer=FrozenBatchNorm2d
        )  # as torchvision builds it for its released weights
        result = model.load_state_dict(torch.load(path, weights_only=True))
        assert not result.missing_keys and not result.unexpected_keys
        assert _unequal(load_model(str(path)), loaded) == []

    def test_hugging_face_has_no_form_for_it(self, loaded: LoadedModel, tmp_path: Path):
        assert loaded.config.family == FASTER_RCNN
        with pytest.raises(UsageError, match="transformers has none"):
            export_model(loaded, "huggingface", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["huggingface", "authors"])
def test_a_trunk_of_our_own_is_refused(to: str, tmp_path: Path):
    config = replace(PRESETS["tiny"], encoder_layers=1, decoder_layers=1)
    with pytest.raises(UsageError, match="its trunk exists in ddetr only"):
        export_model(_loaded(config), to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="Choose one of huggingface, authors, ddetr"):
        export_model(_loaded(_small("r50")), "onnx", tmp_path / "out")


def test_a_folder_cut_short_by_a_full_disk_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ddetr_cli.weights import export

    def full(path: Path, data: bytes, *, durable: bool) -> None:
        raise OutputError(f"{path}: not written (No space left on device). Free space or choose another place.")

    monkeypatch.setattr(export, "write_atomically", full)
    with pytest.raises(OutputError, match="No space left"):
        export_model(_loaded(_small("r50")), "huggingface", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "preprocessor_config.json"]


def test_the_config_says_what_transformers_4_needs(tmp_path: Path):
    export_model(_loaded(_small("r50-single-scale-dc5")), "huggingface", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["backbone"] == "resnet50" and config["use_timm_backbone"] and not config["use_pretrained_backbone"]
    assert config["dilation"] and config["num_feature_levels"] == 1
    assert config["architectures"] == ["DeformableDetrForObjectDetection"]
