from __future__ import annotations

import torch

from ddetr_cli.weights.layouts.heads import every_head, head_count, heads_are_shared, one_head, repeated_heads


def test_shared_heads_are_told_from_separate_ones():
    shared = {f"class_embed.{i}.bias": torch.ones(3) for i in range(6)}
    assert heads_are_shared(shared) and list(one_head(shared)) == ["class_embed.0.bias"]
    assert not heads_are_shared({**shared, "class_embed.4.bias": torch.zeros(3)})
    assert head_count(shared, "class_embed") == 6


def test_a_class_head_stored_once_serves_every_box_head():
    stored = {f"bbox_embed.{i}.layers.0.bias": torch.ones(1) for i in range(3)}
    stored |= {"class_embed.0.weight": torch.ones(2, 1), "class_embed.0.bias": torch.ones(2)}
    assert {f"class_embed.{i}.{p}" for i in range(3) for p in ("weight", "bias")} <= every_head(stored).keys()


def test_a_shared_head_is_repeated_for_each_layer():
    names = repeated_heads("bbox_embed.0.layers.1.bias", refine=False, two_stage=False, decoder_layers=3)
    assert names == [f"bbox_embed.{i}.layers.1.bias" for i in range(3)]


def test_separate_heads_are_repeated_in_the_decoder_where_it_uses_them():
    boxes = {"name": "bbox_embed.2.layers.1.bias", "refine": True, "decoder_layers": 6}
    classes = boxes | {"name": "class_embed.2.bias"}
    assert repeated_heads(**boxes, two_stage=False) == [boxes["name"], f"decoder.{boxes['name']}"]
    assert repeated_heads(**classes, two_stage=False) == [classes["name"]]
    assert repeated_heads(**classes, two_stage=True) == [classes["name"], f"decoder.{classes['name']}"]


def test_what_is_no_head_of_a_list_has_no_repetitions():
    assert repeated_heads("class_embed.weight", refine=False, two_stage=False, decoder_layers=6) is None
