from __future__ import annotations

from ddetr_cli.weights.layouts.names import is_counter, neck_rules, renamed, rules


def test_counters_of_training_tools_are_not_weights():
    assert all(
        is_counter(f"backbone.0.body.bn1.{name}") for name in ("num_batches_tracked", "total_ops", "total_params")
    )
    assert is_counter("total_ops") and not is_counter("bn1.weight")


def test_rules_apply_in_their_order():
    assert renamed("a.b", rules(("^a", "c"), ("^c", "d"))) == "d.b"


def test_extra_projections_are_numbered_after_those_of_the_trunks_maps():
    names = ["neck.convs.0.conv.weight", "neck.convs.1.conv.weight", "neck.convs.2.gn.weight"]
    assert renamed("neck.extra_convs.0.conv.weight", neck_rules(names)) == "input_proj.3.0.weight"
    assert renamed("neck.extra_convs.1.norm.weight", neck_rules(names[:1])) == "input_proj.2.1.weight"
    assert renamed("neck.convs.2.gn.weight", neck_rules(names)) == "input_proj.2.1.weight"
