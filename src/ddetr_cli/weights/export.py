"""Models written as others read them: Hugging Face's folder, the authors' ``.pth``, our own file.

Nothing is computed: every tensor comes back bit for bit, with the class table, which the files of others have no
place for, kept beside it for us.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ddetr_cli.atomic import write_atomically, write_json
from ddetr_cli.classes import ClassTable
from ddetr_cli.errors import UsageError
from ddetr_cli.presets import DEFORMABLE_DETR, FASTER_RCNN, ModelConfig
from ddetr_cli.weights.checkpoint import save_checkpoint
from ddetr_cli.weights.facts import CLASSES_KEY, IMAGE_SIZE_KEY, MODEL_TYPES
from ddetr_cli.weights.layouts import is_counter, to_authors, to_hugging_face
from ddetr_cli.weights.load import LoadedModel

FORMATS = ("huggingface", "authors", "ddetr")
_ARCHITECTURES = {"deformable_detr": "DeformableDetrForObjectDetection", "detr": "DetrForObjectDetection"}
_PROCESSORS = {"deformable_detr": "DeformableDetrImageProcessor", "detr": "DetrImageProcessor"}
# How transformers shows an index that names nothing.
_NO_NAME = "N/A"


def export_model(loaded: LoadedModel, to: str, output: Path) -> list[Path]:
    """Write a model in one of ``FORMATS`` and give the files written; what stands in their place is replaced.

    Raises UsageError for a system that the format has no form for, OutputError where nothing can be written.
    """
    if to not in FORMATS:
        raise UsageError(f"--to {to}: unknown. Choose one of {', '.join(FORMATS)}.")
    if to == "ddetr":
        save_checkpoint(output, loaded.model, loaded.classes)
        return [output]
    if loaded.config.backbone != "resnet50":
        raise UsageError(
            f"--to {to}: not possible for a {loaded.config.preset} model (its trunk exists in ddetr only). "
            "Use --to ddetr."
        )
    if to == "authors":
        return _write_authors(loaded, output)
    if loaded.config.family == FASTER_RCNN:
        raise UsageError(
            "--to huggingface: not possible for Faster R-CNN (transformers has none). "
            "Use --to authors for torchvision's file."
        )
    return _write_hugging_face(loaded, output)


def _write_authors(loaded: LoadedModel, path: Path) -> list[Path]:
    """The file that the authors' ``--resume`` reads; of Faster R-CNN the state dict that torchvision loads."""
    state = loaded.model.state_dict()
    content: dict[str, Any]
    if loaded.config.family == FASTER_RCNN:
        content = {name: tensor for name, tensor in state.items() if not is_counter(name)}
    else:
        # A plain table instead of their Namespace, so that torch's restricted reader takes the file.
        content = {"model": to_authors(state, loaded.config), "args": _arguments(loaded.config, loaded.classes)}
    stream = io.BytesIO()
    torch.save(content, stream)
    write_atomically(path, stream.getvalue(), durable=True)
    return [path]


def _write_hugging_face(loaded: LoadedModel, folder: Path) -> list[Path]:
    tensors = to_hugging_face(loaded.model.state_dict(), loaded.config)
    # A tensor of its own for every name: safetensors stores no tensor twice.
    content = safetensors.torch.save(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        {"format": "pt", CLASSES_KEY: json.dumps(loaded.classes.to_json())},
    )
    # The weights last: a folder cut short by a full disk is no model yet.
    write_json(folder / "config.json", _hugging_face_config(loaded.config, loaded.classes))
    write_json(folder / "preprocessor_config.json", _preprocessor(loaded.config))
    write_atomically(folder / "model.safetensors", content, durable=True)
    return [folder / name for name in ("config.json", "preprocessor_config.json", "model.safetensors")]


def _arguments(config: ModelConfig, classes: ClassTable) -> dict[str, Any]:
    """The authors' command line for this model, as far as it decides what the model is."""
    arguments: dict[str, Any] = {
        "backbone": config.backbone,
        "dilation": config.dilation,
        "position_embedding": "sine",
        "enc_layers": config.encoder_layers,
        "dec_layers": config.decoder_layers,
        "dim_feedforward": config.ffn_dim,
        "hidden_dim": config.hidden_dim,
        "dropout": config.dropout,
        "nheads": config.heads,
        "num_queries": config.queries,
        IMAGE_SIZE_KEY: config.image_size,
        CLASSES_KEY: json.dumps(classes.to_json()),
    }
    if config.family == DEFORMABLE_DETR:
        arguments |= {
            "num_feature_levels": config.levels,
            "enc_n_points": config.points,
            "dec_n_points": config.points,
            "with_box_refine": config.refine_boxes,
            "two_stage": config.two_stage,
        }
    return arguments


def _hugging_face_config(config: ModelConfig, classes: ClassTable) -> dict[str, Any]:
    model_type = MODEL_TYPES[config.family]
    labels = {str(index): name or _NO_NAME for index, name in enumerate(classes.names)}
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "use_timm_backbone": True,
        "backbone": config.backbone,
        "use_pretrained_backbone": False,  # its weights are in the file
        "dilation": config.dilation,
        "d_model": config.hidden_dim,
        "num_queries": config.queries,
        "dropout": config.dropout,
        "activation_function": "relu",
        "position_embedding_type": "sine",
        "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
    }
    for part, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        values[f"{part}_layers"] = layers
        values[f"{part}_ffn_dim"] = config.ffn_dim
        values[f"{part}_attention_heads"] = config.heads
    if config.family == DEFORMABLE_DETR:
        values |= {
            "num_feature_levels": config.levels,
            "encoder_n_points": config.points,
            "decoder_n_points": config.points,
            "with_box_refine": config.refine_boxes,
            "two_stage": config.two_stage,
            "two_stage_num_proposals": config.queries,
        }
    return values


def _preprocessor(config: ModelConfig) -> dict[str, Any]:
    return {
        "image_processor_type": _PROCESSORS[MODEL_TYPES[config.family]],
        "format": "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size, "longest_edge": config.image_size * 1333 // 800},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_pad": True,
    }
