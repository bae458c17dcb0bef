"""Our own checkpoints: safetensors with everything needed to use them in the header, and a checksum over all of it.

The header's ``ddetr`` entry is JSON: ``format`` (a number that grows when an old reader would misread), the version
that wrote it, the model's configuration, its class table, and a digest over the tensors. Written beside the target
and renamed, so that a name never holds half a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ddetr_cli import __version__
from ddetr_cli.atomic import write_atomically
from ddetr_cli.classes import ClassTable
from ddetr_cli.errors import CheckpointError, OutputError
from ddetr_cli.model.backbone import BACKBONES
from ddetr_cli.model.detector import DetectionModel
from ddetr_cli.presets import ModelConfig
from ddetr_cli.weights.facts import is_sound
from ddetr_cli.weights.reader import StoredFile, file_sha256
from ddetr_cli.weights.recognition import checked

FORMAT = 1
METADATA_KEY = "ddetr"


@dataclass(frozen=True)
class CheckpointHeader:
    """What one of our checkpoints says about itself."""

    config: ModelConfig
    classes: ClassTable
    ddetr_version: str


def save_checkpoint(
    path: Path,
    model: DetectionModel,
    classes: ClassTable,
    *,
    half: bool = False,
    extra: Mapping[str, str] | None = None,
) -> str:
    """Write ``model`` and its class table to ``path``, whole or not at all; returns the file's sha256.

    ``half`` stores float16 where every value fits it (read back as float32). ``extra`` goes into the header as it is.
    Raises OutputError where the file cannot be written, CheckpointError for weights that are not finite.
    """
    if len(classes) != model.config.classes:
        raise ValueError(f"{len(classes)} classes in the table, {model.config.classes} in the model")
    tensors = {name: _stored(name, tensor, half) for name, tensor in model.state_dict().items()}
    header = {
        "format": FORMAT,
        "ddetr_version": __version__,
        "config": model.config.to_dict(),
        "classes": classes.to_json(),
        "sha256": digest(tensors),
    }
    metadata = {**(extra or {}), METADATA_KEY: json.dumps(header, allow_nan=False)}
    content = safetensors.torch.save(tensors, metadata)
    write_atomically(path, content, durable=True)
    written = hashlib.sha256(content).hexdigest()
    if file_sha256(path) != written:
        raise OutputError(f"{path}: does not hold what was written (a failing disk?). Save somewhere else.")
    return written


def parse_header(stored: StoredFile) -> CheckpointHeader | None:
    """The header of one of our checkpoints, its checksum verified; None for a file that is not ours.

    Raises CheckpointError for a newer format, a damaged header or numbers that changed since they were written.
    """
    text = stored.metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        header = json.loads(text)
        version, written_by = header["format"], str(header["ddetr_version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged_header(stored.path) from error
    if not isinstance(version, int) or version > FORMAT:
        raise CheckpointError(
            f"{stored.path}: made by ddetr {written_by[:40]} (checkpoint format {str(version)[:20]}, this is ddetr "
            f"{__version__} with format {FORMAT}). Update ddetr."
        )
    try:
        config = checked(ModelConfig.from_dict(header["config"]))
        classes = ClassTable.from_json(header["classes"])
        expected = header["sha256"]
    except CheckpointError as error:
        raise CheckpointError(f"{stored.path}: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged_header(stored.path) from error
    if config.backbone not in BACKBONES or len(classes) != config.classes or not is_sound(classes):
        raise _damaged_header(stored.path)
    if digest(stored.tensors) != expected:
        raise CheckpointError(
            f"{stored.path}: damaged (its numbers do not match their checksum). Copy or download it again."
        )
    return CheckpointHeader(config, classes, written_by)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _stored(name: str, tensor: Tensor, half: bool) -> Tensor:
    tensor = tensor.detach().to("cpu").contiguous()
    if not tensor.is_floating_point():
        return tensor
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name}: not saved (it holds NaN or infinity). Go back to an earlier checkpoint.")
    if half:
        narrow = tensor.to(torch.float16)
        if bool(torch.isfinite(narrow).all()):  # a variance over 65504 stays wide
            return narrow
    return tensor


def _damaged_header(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: its ddetr header is damaged. Copy or download it again.")
