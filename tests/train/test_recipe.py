from __future__ import annotations

import pytest
import torch

from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import get_preset
from ddetr_cli.train.recipe import (
    FROZEN,
    AveragedWeights,
    detr_recipe,
    freeze_parameters,
    paper_recipe,
    parameter_groups,
    rate_factor,
    scratch_recipe,
)


def test_the_paper_recipe_at_batch_32_is_the_published_one() -> None:
    recipe = paper_recipe(batch_size=32)
    assert (recipe.learning_rate, recipe.backbone_rate, recipe.weight_decay) == (2e-4, 2e-5, 1e-4)
    assert (recipe.epochs, recipe.clip_norm, recipe.seed, recipe.augmentation) == (50, 0.1, 42, "paper")
    factors = [rate_factor(recipe, epoch * 10, steps_per_epoch=10) for epoch in (0, 39, 40, 49)]
    assert factors == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_detrs_recipe_at_batch_16_is_the_published_one() -> None:
    recipe = detr_recipe(batch_size=16)
    assert (recipe.learning_rate, recipe.backbone_rate, recipe.weight_decay) == (1e-4, 1e-5, 1e-4)
    assert (recipe.epochs, recipe.clip_norm, recipe.seed, recipe.augmentation) == (300, 0.1, 42, "paper")
    factors = [rate_factor(recipe, epoch * 10, steps_per_epoch=10) for epoch in (0, 199, 200, 299)]
    assert factors == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_rates_scale_linearly_with_the_batch() -> None:
    assert paper_recipe(batch_size=2).learning_rate == pytest.approx(2e-4 / 16)
    assert detr_recipe(batch_size=2).learning_rate == pytest.approx(1e-4 / 8)


def test_parameter_groups_are_the_authors() -> None:
    with torch.device("meta"):
        model = build_detector(get_preset("r50-single-scale"))
    groups = {group["name"]: group for group in parameter_groups(model, paper_recipe(batch_size=32))}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"rest": 2e-4, "backbone": 2e-5, "offsets": 2e-5}
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_offsets = {names[id(p)] for p in groups["offsets"]["params"]}
    assert in_offsets == {n for n in names.values() if "sampling_offsets" in n or "reference_points" in n}
    in_backbone = {names[id(p)] for p in groups["backbone"]["params"]}
    assert in_backbone and all(
        n.startswith(("backbone.layer2", "backbone.layer3", "backbone.layer4")) for n in in_backbone
    )
    total = sum(p.numel() for group in groups.values() for p in group["params"])
    assert total == 33_844_193


def test_detr_has_the_trunk_and_the_rest_for_parameter_groups() -> None:
    with torch.device("meta"):
        model = build_detector(get_preset("detr-r50"))
    groups = {group["name"]: group for group in parameter_groups(model, detr_recipe(batch_size=16))}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx({"rest": 1e-4, "backbone": 1e-5})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_backbone = {names[id(p)] for p in groups["backbone"]["params"]}
    assert in_backbone == {n for n in names.values() if n.startswith("backbone.layer") and "layer1" not in n}
    assert sum(p.numel() for group in groups.values() for p in group["params"]) == 41_302_368


def test_the_cosine_schedule_warms_up_and_ends_low() -> None:
    recipe = scratch_recipe(epochs=10, warmup_steps=5)
    factors = [rate_factor(recipe, step, steps_per_epoch=10) for step in range(100)]
    assert factors[0] == pytest.approx(0.2, rel=0.01)
    assert max(factors) == pytest.approx(1.0, abs=0.02)
    assert factors[-1] == pytest.approx(0.01)
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_restored_averages_stay_where_the_model_is() -> None:
    average = AveragedWeights(torch.nn.Linear(2, 2), decay=0.5)
    own = average.state["weight"]
    stored = {name: torch.full_like(tensor, 3.0) for name, tensor in average.state.items()}
    average.restore(stored, steps=7)
    # Copied into the tensors on the model's device; a checkpoint is read to the CPU.
    assert average.state["weight"] is own and own.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert average.steps == 7


def test_averaged_weights_follow_the_model_and_copy_counters() -> None:
    model = torch.nn.BatchNorm1d(2)
    average = AveragedWeights(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    average.update(model.state_dict())
    # First step: keep min(0.5, 1/11), so 1/11 * 1 + 10/11 * 3.
    assert average.state["weight"].tolist() == pytest.approx([31 / 11] * 2)
    assert average.state["num_batches_tracked"].item() == 7


def test_freezing_names_the_trunk_then_the_encoder_then_all_but_heads_and_queries() -> None:
    trained = {}
    for freeze in FROZEN:
        with torch.device("meta"):
            model = build_detector(get_preset("r50-two-stage"))
        freeze_parameters(model, freeze)
        trained[freeze] = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        has_encoder = any(n.startswith("transformer.encoder") for n, p in model.named_parameters() if p.requires_grad)
        assert has_encoder == (freeze in ("none", "backbone"))
    heads = {"class_embed", "bbox_embed"}
    assert trained == {
        "none": heads | {"backbone", "input_proj", "transformer"},
        "backbone": heads | {"input_proj", "transformer"},
        "encoder": heads | {"transformer"},
        "transformer": heads,
    }
