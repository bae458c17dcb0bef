"""detrex's names for Deformable DETR: detectron2's trunk, and layers as numbered lists.

In a layer of the decoder, attention 0 is the one over the queries and 1 the one over the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ddetr_cli.weights.layouts.names import NORM_RULES, neck_rules, renamed, rules

_RULES = rules(
    (r"^backbone\.stem\.", "backbone."),
    *((rf"^backbone\.res{n + 1}\.", f"backbone.layer{n}.") for n in range(1, 5)),
    (r"^(backbone\..*)conv(\d)\.norm\.", r"\1bn\2."),
    (r"^(backbone\..*)shortcut\.norm\.", r"\1downsample.1."),
    (r"^(backbone\..*)shortcut\.", r"\1downsample.0."),
    (r"^query_embedding\.", "query_embed."),
    (r"^transformer\.decoder\.(class_embed|bbox_embed)\.", r"\1."),
    (r"^transformer\.level_embeds$", "transformer.level_embed"),
    (r"\.ffns\.0\.layers\.0\.0\.", ".linear1."),
    (r"\.ffns\.0\.layers\.1\.", ".linear2."),
    (r"(\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(\.decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn."),
    (r"(\.decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
)


def renamer(names: Iterable[str]) -> Callable[[str], str]:
    """A function from the names of this file to ours."""
    every = _RULES + NORM_RULES + neck_rules(names)
    return lambda name: renamed(name, every)
