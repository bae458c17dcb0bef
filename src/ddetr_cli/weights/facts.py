"""What stands beside the tensors of a foreign file: how its model computes, and what its classes are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddetr_cli.classes import COCO_NAMES, COCO_TABLE, CategoryId, ClassTable
from ddetr_cli.presets import DEFORMABLE_DETR, DETR
from ddetr_cli.weights.reader import StoredFile

# Our families, as Hugging Face's config.json names them.
MODEL_TYPES = {DEFORMABLE_DETR: "deformable_detr", DETR: "detr"}
# Where ``export`` keeps what the files of others have no place for: category ids, and the short side in pixels.
CLASSES_KEY, IMAGE_SIZE_KEY = "ddetr_classes", "ddetr_image_size"
# A size rule of transformers' other than ours (the short side, and at most 1333/800 of it), in its own words.
OTHER_SIZE_KEY = "ddetr_other_size"


def facts_about(stored: StoredFile, *, hugging_face_family: str | None) -> dict[str, Any]:
    """Stored arguments and metadata and, of a model of Hugging Face's, the JSON files it keeps beside its weights."""
    facts: dict[str, Any] = {**stored.arguments, **stored.metadata}
    if hugging_face_family is None:
        return facts
    config = _json_beside(stored.path, "config.json")
    if config.get("model_type") != MODEL_TYPES[hugging_face_family]:
        return facts
    return {**facts, **config, **_of_size(_json_beside(stored.path, "preprocessor_config.json")), **_of_trunk(config)}


def _of_size(processor: Mapping[str, Any]) -> dict[str, Any]:
    """The size of pictures by transformers' processor, and its rule in its own words where ours is another."""
    size = processor.get("size")
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": processor.get("max_size")}
    if not isinstance(size, dict):
        return {}
    short, longest = size.get("shortest_edge"), size.get("longest_edge")
    found: dict[str, Any] = {IMAGE_SIZE_KEY: short} if isinstance(short, int) else {}
    if short is None or (
        isinstance(short, int) and isinstance(longest, int) and abs(longest - short * 1333 // 800) > 1
    ):
        found[OTHER_SIZE_KEY] = ", ".join(f"{key} {value}" for key, value in size.items())[:100]
    return found


# Of transformers' own ResNet; its tensors are the same either way.
_ARITHMETIC_OF_TRUNK = ("hidden_act", "downsample_in_first_stage", "downsample_in_bottleneck")


def _of_trunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Hugging Face's configuration says of the trunk alone and its tensors do not show."""
    found: dict[str, Any] = {}
    for part in (config.get("backbone_config"), config.get("backbone_kwargs")):
        if isinstance(part, dict):
            found |= {key: part[key] for key in _ARITHMETIC_OF_TRUNK if key in part}
            found |= {"dilation": True} if part.get("output_stride") == 16 else {}
            if part.get("output_stride") not in (None, 16, 32):
                found["output_stride"] = part["output_stride"]
    return found


def other_model_type(path: Path) -> str | None:
    """What the ``config.json`` beside a file calls its model, where that is none of transformers' read here."""
    declared = _json_beside(path, "config.json").get("model_type")
    return declared[:40] if isinstance(declared, str) and declared not in ("", *MODEL_TYPES.values()) else None


def class_table(count: int, facts: Mapping[str, Any], *, is_contiguous: bool) -> ClassTable:
    """What the classes of a foreign file are: as ``export`` wrote them, else COCO's, else numbered from 0.

    91 outputs are COCO's category ids, and 80 in a layout that ``is_contiguous`` are its categories, unless names
    tell otherwise.
    """
    if (exported := _exported(facts)) is not None and len(exported) == count:
        return exported
    names = _names(count, facts)
    if count == len(COCO_TABLE) and _may_be_coco(names):
        return COCO_TABLE
    if count == len(COCO_NAMES) and is_contiguous and names in ((None,) * count, tuple(COCO_NAMES.values())):
        return ClassTable(tuple(COCO_NAMES), tuple(COCO_NAMES.values()))
    return ClassTable(tuple(range(count)), names)


def _may_be_coco(names: tuple[str | None, ...]) -> bool:
    """Whether 91 names are COCO's, most of them in their places, or no names: absent, or Hugging Face's LABEL_0."""
    if names[0] == "LABEL_0" or not any(names):
        return True
    return sum(names[index] == name for index, name in COCO_NAMES.items()) > len(COCO_NAMES) // 2


def _names(count: int, facts: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Hugging Face's ``id2label`` or mmdetection's classes, if they are as many as the outputs."""
    labels = facts.get("id2label", facts.get("class_names"))
    if isinstance(labels, dict):
        labels = [labels.get(str(index)) for index in range(len(labels))]
    if not isinstance(labels, (list, tuple)) or len(labels) != count:
        return (None,) * count
    return tuple(label if isinstance(label, str) else None for label in labels)


def _exported(facts: Mapping[str, Any]) -> ClassTable | None:
    try:
        table = ClassTable.from_json(json.loads(facts[CLASSES_KEY]))
    except (KeyError, ValueError, TypeError, IndexError, RecursionError):
        return None
    return table if is_sound(table) else None


def is_sound(classes: ClassTable) -> bool:
    """Whether a class table read from a file has ids and names of the types they must have."""

    def is_id(value: CategoryId) -> bool:
        return isinstance(value, (int, str)) and not isinstance(value, bool)

    return all(is_id(i) for i in classes.category_ids) and all(n is None or isinstance(n, str) for n in classes.names)


def _json_beside(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path.parent / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
