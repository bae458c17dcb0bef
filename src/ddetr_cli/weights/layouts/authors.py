"""The authors' checkpoints, of Deformable DETR and of DETR alike.

The trunk is ``backbone.0.body.``; Deformable DETR's heads are repeated for each of the decoder's layers even where
all layers share one, and again under ``transformer.decoder.`` where refinement or proposals use them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ddetr_cli.presets import ModelConfig
from ddetr_cli.weights.layouts.heads import repeated_heads
from ddetr_cli.weights.layouts.names import is_counter, renamed, rules

_RULES = rules((r"^backbone\.0\.body\.", "backbone."), (r"^transformer\.decoder\.(class_embed|bbox_embed)\.", r"\1."))


def from_authors(name: str) -> str:
    """Our name for one of theirs."""
    return renamed(name, _RULES)


def to_authors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors under the authors' names, with every repetition their checkpoints hold (SPEC of the key counts)."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if is_counter(name):
            continue
        heads = repeated_heads(
            name, refine=config.refine_boxes, two_stage=config.two_stage, decoder_layers=config.decoder_layers
        )
        if heads is None:
            out[name.replace("backbone.", "backbone.0.body.", 1) if name.startswith("backbone.") else name] = tensor
        else:
            out.update({f"transformer.{head}" if head.startswith("decoder.") else head: tensor for head in heads})
    return out
