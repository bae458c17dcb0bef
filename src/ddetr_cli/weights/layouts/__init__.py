"""Names of tensors: how the world calls the same weights, and what a file's names reveal.

Ours are the authors' names with the trunk as ``backbone.`` and every shared tensor once. Each layout has a module;
those that can be written have both directions in it. Any repetition may be absent from a file, and must agree with
its first copy where present.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ddetr_cli.errors import CheckpointError
from ddetr_cli.presets import DEFORMABLE_DETR, DETR, FASTER_RCNN
from ddetr_cli.weights.layouts import authors, detrex, huggingface, mmdetection
from ddetr_cli.weights.layouts.authors import to_authors
from ddetr_cli.weights.layouts.heads import every_head, head_count, heads_are_shared, one_head
from ddetr_cli.weights.layouts.huggingface import to_hugging_face
from ddetr_cli.weights.layouts.names import is_counter

__all__ = [
    "AUTHORS",
    "DETREX",
    "HUGGING_FACE",
    "MMDETECTION",
    "OURS",
    "TORCHVISION",
    "every_head",
    "head_count",
    "heads_are_shared",
    "is_counter",
    "one_head",
    "recognise",
    "to_authors",
    "to_hugging_face",
    "to_ours",
]

OURS, AUTHORS, HUGGING_FACE = "ddetr", "authors' .pth", "Hugging Face"
DETREX, MMDETECTION, TORCHVISION = "detrex", "mmdetection", "torchvision"

# The first that fits: mmdetection's trunk has our names, in version 2 too, whose other names are not read.
_MARKS = (
    (r"backbone\.0\.body\.", AUTHORS),
    (r"model\.backbone\.", HUGGING_FACE),
    (r"backbone\.stem\.", DETREX),
    (r"bbox_head\.(cls|reg)_branches\.", MMDETECTION),
    (r"bbox_head\.", ""),
    (r"backbone\.body\.", TORCHVISION),
    (r"backbone\.conv1\.", OURS),
)
_FAMILIES = (
    (r".*\.sampling_offsets\.", DEFORMABLE_DETR, (AUTHORS, HUGGING_FACE, DETREX, MMDETECTION, OURS)),
    (r"roi_heads\.box_predictor\.", FASTER_RCNN, (TORCHVISION,)),
    (r"transformer\.decoder\.layers\.0\.multihead_attn\.", DETR, (AUTHORS, OURS)),
    (r"model\.decoder\.layers\.0\.encoder_attn\.q_proj\.", DETR, (HUGGING_FACE,)),
)  # fmt: skip


def recognise(names: Iterable[str]) -> tuple[str, str] | None:
    """Which layout and which family of systems a file's names belong to, or None where it is none read here."""
    known = list(names)

    def has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in known)

    layout = next((layout for pattern, layout in _MARKS if has(pattern)), "")
    for pattern, family, layouts in _FAMILIES:
        if layout in layouts and has(pattern):
            return layout, family
    return None


def to_ours(tensors: Mapping[str, Tensor], layout: str, family: str) -> tuple[dict[str, Tensor], bool]:
    """Tensors under our names, heads still one per layer as far as stored; and whether the decoder had copies.

    Raises CheckpointError where two copies of one tensor differ.
    """
    if layout == OURS:
        return dict(tensors), False
    given = {name: tensor for name, tensor in tensors.items() if not is_counter(name)}
    rename = _renamer(given, layout, family)
    ours: dict[str, Tensor] = {}
    decoder_has_heads = False
    for name, tensor in given.items():
        new = rename(name)
        decoder_has_heads |= bool(re.match(r"(model|transformer)\.decoder\.bbox_embed\.", name))
        if new in ours and not torch.equal(ours[new], tensor):
            raise CheckpointError(
                f"{name}: differs from its copy {new} in the same file (the model shares one tensor). "
                "Save the model again."
            )
        ours.setdefault(new, tensor)
    if layout == HUGGING_FACE:
        ours = huggingface.joined(ours)
    elif layout == MMDETECTION:
        ours = mmdetection.with_biases(ours)
    return ours, decoder_has_heads


def _renamer(tensors: Iterable[str], layout: str, family: str) -> Callable[[str], str]:
    if layout == AUTHORS:
        return authors.from_authors
    if layout == HUGGING_FACE:
        return lambda name: huggingface.from_hugging_face(name, family)
    if layout == DETREX:
        return detrex.renamer(tensors)
    if layout == MMDETECTION:
        return mmdetection.renamer(tensors)
    return lambda name: name  # torchvision's detector is our detector
