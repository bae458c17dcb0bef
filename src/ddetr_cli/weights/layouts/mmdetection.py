"""mmdetection 3.x's names for Deformable DETR: the trunk as ours, the parts of the transformer at the top."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from ddetr_cli.weights.layouts.names import NORM_RULES, neck_rules, renamed, rules

_RULES = rules(
    (r"^query_embedding\.", "query_embed."),
    (r"^bbox_head\.cls_branches\.", "class_embed."),
    # The layers between are ReLUs.
    *((rf"^bbox_head\.reg_branches\.(\d+)\.{2 * n}\.", rf"bbox_embed.\1.layers.{n}.") for n in range(3)),
    (r"^(encoder|decoder)\.layers\.", r"transformer.\1.layers."),
    (r"^level_embed$", "transformer.level_embed"),
    (r"^reference_points_fc\.", "transformer.reference_points."),
    (r"^memory_trans_fc\.", "transformer.enc_output."),
    (r"^memory_trans_norm\.", "transformer.enc_output_norm."),
    (r"^pos_trans_fc\.", "transformer.pos_trans."),
    (r"^pos_trans_norm\.", "transformer.pos_trans_norm."),
    (r"\.ffn\.layers\.0\.0\.", ".linear1."),
    (r"\.ffn\.layers\.1\.", ".linear2."),
    (r"\.self_attn\.attn\.", ".self_attn."),
)


def renamer(names: Iterable[str]) -> Callable[[str], str]:
    """A function from the names of this file to ours."""
    every = _RULES + NORM_RULES + neck_rules(names)
    return lambda name: renamed(name, every)


def with_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with zeros for the biases of projections: mmdetection leaves them out before a norm."""
    out = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("input_proj.") and name.endswith(".0.weight"):
            out.setdefault(name.removesuffix("weight") + "bias", tensor.new_zeros(tensor.shape[0]))
    return out
