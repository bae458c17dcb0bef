"""Files of others, whole: every tensor finds its place, whatever the layout and what else is in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr_cli.classes import COCO_NAMES, COCO_TABLE
from ddetr_cli.errors import CheckpointError
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import DETR, PRESETS, ModelConfig
from ddetr_cli.weights import LoadedModel, load, load_model
from ddetr_cli.weights.layouts import to_authors, to_hugging_face
from ddetr_cli.weights.reader import file_sha256


@pytest.fixture(scope="module")
def full_size_detr() -> dict[str, Tensor]:
    config = PRESETS["detr-r50"]
    return to_authors({name: t.half() for name, t in build_detector(config).state_dict().items()}, config)


@pytest.fixture(scope="module")
def faster_rcnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's own model as float16, with one counter of a BatchNorm that was not frozen."""
    detection = pytest.importorskip("torchvision.models.detection")
    model = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    state = {name: t.half() for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    path = tmp_path_factory.mktemp("faster") / "model.pth"
    torch.save(state | {"backbone.body.bn1.num_batches_tracked": torch.tensor(3)}, path)
    return path


VARIANTS: list[dict[str, Any]] = [
    {}, {"refine_boxes": True}, {"refine_boxes": True, "two_stage": True}, {"levels": 1},
    {"levels": 1, "family": DETR},
]  # fmt: skip


def _same_tensors(a: LoadedModel, b: LoadedModel) -> bool:
    first, second = a.model.state_dict(), b.model.state_dict()
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("layout", ["authors", "Hugging Face"])
def test_missing_copies_wrappers_and_counters_do_no_harm(states, write, changes, layout: str):
    full = states(**changes)
    reference = load_model(str(write(full, "full.pth", num_queries=7)))
    copies = ("transformer.decoder.class_embed.", "transformer.decoder.bbox_embed.")
    shared = () if changes.get("refine_boxes") or "family" in changes else ("class_embed.1.", "bbox_embed.1.")
    state = {name: tensor for name, tensor in full.items() if not name.startswith((*copies, *shared))}
    trunk = "backbone.0.body"
    if layout == "Hugging Face":
        state = to_hugging_face(reference.model.half().state_dict(), reference.config)
        reference.model.float()
        dropped = ("model.decoder.class_embed.", "model.decoder.bbox_embed.", *shared)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}
        trunk = "model.backbone.conv_encoder.model"
    state |= {
        "total_ops": torch.zeros(1, dtype=torch.float64),
        f"{trunk}.bn1.total_params": torch.zeros(1),
        f"{trunk}.bn1.num_batches_tracked": torch.tensor(3),
    }
    loaded = load_model(str(write({f"module.{name}": tensor for name, tensor in state.items()}, num_queries=7)))
    assert loaded.report.layout == ("authors' .pth" if layout == "authors" else layout)
    assert len(loaded.report.ignored) == 3
    assert loaded.config == reference.config
    assert _same_tensors(loaded, reference)


class TestDetrexAndMmdetection:
    @pytest.mark.parametrize("changes", [v for v in VARIANTS if "family" not in v])
    @pytest.mark.parametrize("layout", ["detrex", "mmdetection"])
    def test_every_tensor_finds_its_place(self, states, write, layout_of, changes, layout: str):
        full = {n: torch.zeros_like(t) if n.startswith("input_proj.") and n.endswith(".0.bias") else t
                for n, t in states(**changes).items()}  # fmt: skip
        state = layout_of[layout](full) | {"backbone.bn1.num_batches_tracked": torch.tensor(3)}
        loaded = load_model(str(write({f"module.{name}": t for name, t in state.items()}, num_queries=7)))
        reference = load_model(str(write(full, "full.pth", num_queries=7)))
        assert loaded.report.layout == layout
        assert loaded.report.ignored == ("backbone.bn1.num_batches_tracked",)
        assert loaded.config == reference.config
        assert _same_tensors(loaded, reference)

    @pytest.mark.parametrize("layout", ["detrex", "mmdetection"])
    def test_80_classes_are_cocos_under_cocos_ids(self, states, write, layout_of, layout: str):
        loaded = load_model(str(write(layout_of[layout](states(classes=91)))))
        assert (loaded.classes.category_ids, loaded.classes.names) == (tuple(COCO_NAMES), tuple(COCO_NAMES.values()))
        assert loaded.classes.category_ids[79] == 90 and loaded.classes.name(79) == "toothbrush"

    @pytest.mark.parametrize(
        ("meta", "ids"),
        [
            ({"dataset_meta": {"classes": tuple(COCO_NAMES.values())}}, tuple(COCO_NAMES)),
            ({"dataset_meta": {"classes": tuple(f"bird {i}" for i in range(80))}}, tuple(range(80))),
            ({"CLASSES": tuple(f"bird {i}" for i in range(80))}, tuple(range(80))),
        ],
    )
    def test_names_that_mmdetection_stores_tell_whose_80_they_are(self, states, layout_of, tmp_path: Path, meta, ids):
        state = layout_of["mmdetection"](states(classes=91))
        torch.save({"meta": meta | {"epoch": 50}, "state_dict": state}, tmp_path / "epoch_50.pth")
        classes = load_model(str(tmp_path / "epoch_50.pth")).classes
        assert classes.category_ids == ids
        assert classes.names == (meta.get("dataset_meta") or {"classes": meta.get("CLASSES")})["classes"]

    def test_80_classes_in_the_authors_layout_are_numbered(self, states, write):
        assert load_model(str(write(states(classes=80)))).classes.category_ids == tuple(range(80))


class TestDetr:
    def test_the_authors_file_is_recognised(self, states, write):
        loaded = load_model(str(write(states(levels=1, family=DETR), dilation=True)))
        assert loaded.config == ModelConfig(
            "custom", family=DETR, dilation=True, levels=1, hidden_dim=32, encoder_layers=1, decoder_layers=2,
            ffn_dim=32, queries=7, classes=5,
        )  # fmt: skip
        assert len(loaded.classes) == 5
        assert loaded.model.get_parameter("class_embed.weight").shape == (6, 32)

    def test_without_arguments_its_dilation_is_assumed_and_said(self, states, write):
        loaded = load_model(str(write(states(levels=1, family=DETR))))
        assert any("assumed not (--preset detr-r50-dc5 if it is)" in note for note in loaded.report.notes)

    def test_the_published_files_are_known_by_their_checksums(self, full_size_detr, write, monkeypatch):
        path = write(full_size_detr, "downloaded.pth")
        digits = file_sha256(path)[:8]
        monkeypatch.setattr(load, "PUBLISHED", {f"detr-r50-dc5-{digits}": "detr-r50-dc5"})
        loaded = load_model(str(path))
        assert loaded.config == PRESETS["detr-r50-dc5"]
        assert loaded.report.notes == ()

    def test_a_published_name_on_other_bytes_is_refused(self, states, write):
        path = write(states(levels=1, family=DETR), "detr-r50-e632da11.pth")
        with pytest.raises(CheckpointError, match="its sha256 does not begin with e632da11"):
            load_model(str(path))

    def test_a_model_with_norms_before_the_layers_is_refused(self, states, write):
        with pytest.raises(CheckpointError, match="pre_norm: is 'True', and only False is computed here"):
            load_model(str(write(states(levels=1, family=DETR), pre_norm=True)))


class TestFasterRcnn:
    def test_torchvisions_state_dict_is_read(self, faster_rcnn: Path):
        loaded = load_model(str(faster_rcnn))
        assert loaded.config == PRESETS["fasterrcnn-r50-fpn"]
        assert loaded.classes == COCO_TABLE
        assert loaded.report.layout == "torchvision"
        assert loaded.report.ignored == ("backbone.body.bn1.num_batches_tracked",)
        assert not any(tensor.is_meta for tensor in loaded.model.state_dict().values())

    def test_under_torchvisions_name_its_checksum_is_verified(self, faster_rcnn: Path, tmp_path: Path):
        path = tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
        path.hardlink_to(faster_rcnn)
        with pytest.raises(CheckpointError, match=r"damaged \(its sha256 does not begin with 258fb6c6"):
            load_model(str(path))

    def test_another_family_than_named_is_refused(self, faster_rcnn: Path):
        with pytest.raises(CheckpointError, match=r"preset r50: not what the file holds \(this is a Faster R-CNN\)"):
            load_model(str(faster_rcnn), preset="r50")
