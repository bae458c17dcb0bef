from __future__ import annotations

from dataclasses import replace

import pytest

from ddetr_cli.errors import CheckpointError, UsageError
from ddetr_cli.presets import (
    DEFORMABLE_DETR,
    DETR,
    FASTER_RCNN,
    HUB_IDS,
    PRESETS,
    ModelConfig,
    get_preset,
)


def test_every_system_of_the_model_card_has_a_preset_of_its_family():
    families = {name: config.family for name, config in PRESETS.items()}
    assert families == {
        "r50": DEFORMABLE_DETR,
        "r50-refine": DEFORMABLE_DETR,
        "r50-two-stage": DEFORMABLE_DETR,
        "r50-single-scale": DEFORMABLE_DETR,
        "r50-single-scale-dc5": DEFORMABLE_DETR,
        "detr-r50": DETR,
        "detr-r50-dc5": DETR,
        "fasterrcnn-r50-fpn": FASTER_RCNN,
        "tiny": DEFORMABLE_DETR,
        "tiny-plain": DEFORMABLE_DETR,
        "detr-tiny": DETR,
    }
    assert set(HUB_IDS) <= set(PRESETS)


def test_detr_has_its_own_defaults_not_those_of_deformable_detr():
    config = PRESETS["detr-r50"]
    assert (config.queries, config.ffn_dim, config.dropout, config.classes) == (100, 2048, 0.1, 91)
    assert replace(config, preset="detr-r50-dc5", dilation=True) == PRESETS["detr-r50-dc5"]


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_configuration_survives_being_stored(name: str):
    assert ModelConfig.from_dict(PRESETS[name].to_dict()) == PRESETS[name]


def test_a_configuration_stored_before_there_were_families_is_deformable_detr():
    stored = PRESETS["r50"].to_dict()
    del stored["family"]
    assert ModelConfig.from_dict(stored) == PRESETS["r50"]


def test_a_configuration_of_a_newer_version_is_refused_by_the_names_of_its_fields():
    stored = {**PRESETS["r50"].to_dict(), "denoising": True, "anchors": 3}
    with pytest.raises(CheckpointError, match=r"unknown keys anchors, denoising .* Update ddetr\."):
        ModelConfig.from_dict(stored)


def test_an_unknown_preset_is_refused_with_the_ones_there_are():
    with pytest.raises(
        UsageError, match=r"^preset 'r51': unknown\. Choose one of r50, .*, detr-r50, .*, tiny, .*\.$"
    ):
        get_preset("r51")


def test_fields_of_a_preset_can_be_replaced():
    assert get_preset("detr-r50", classes=3) == replace(PRESETS["detr-r50"], classes=3)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"family": "yolo"}, "not one of deformable-detr, detr, faster-rcnn"),
        ({"family": FASTER_RCNN, "backbone": "resnet-tiny"}, "with a resnet50 only"),
        ({"two_stage": True}, "needs refine_boxes"),
    ],
)
def test_a_configuration_that_describes_no_model_is_refused(fields: dict[str, object], why: str):
    with pytest.raises(ValueError, match=why):
        ModelConfig("x", **fields)  # type: ignore[arg-type]
