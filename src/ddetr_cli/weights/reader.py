"""Opening files of unknown origin: whatever holds weights comes out as named tensors, all else is refused.

Content decides, never the suffix. A file can at worst be refused: no code in it runs, no device or pipe is waited
for, nothing is allocated on the word of a header alone. Which tensors make a model is the business of ``layouts``.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ddetr_cli.errors import CheckpointError
from ddetr_cli.weights import pickles, tensorfile
from ddetr_cli.weights.layouts.names import is_counter

# The largest published file of these models holds model and optimizer in under half a gibibyte.
MAX_BYTES = 8 << 30
_LFS = b"version https://git-lfs"
# What DistributedDataParallel, torch.compile and Lightning put before every name. Every name of transformers' own may
# begin with "model." too, but nothing there goes on like this. Lightning keeps a loss beside the model.
_WRAPPER = re.compile(r"module\.|_orig_mod\.|model\.(?=(model|transformer|roi_heads|module|_orig_mod)\.)")
_MOST_WRAPPERS = 3


@dataclass(frozen=True)
class StoredFile:
    """What one file holds: tensors by their names in it, and what it says about itself.

    ``metadata`` is the safetensors header's; ``arguments`` what the training script stored beside the weights (the
    authors' ``args``), reduced to plain values. Tensors may be views of the mapped file: copy before keeping them.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str
    metadata: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


def read_file(path: Path) -> StoredFile:
    """The tensors of a ``.pth``, ``.bin`` or safetensors file. Raises CheckpointError with the reason."""
    head = _head(path)
    if tensorfile.looks_like(head):
        metadata, tensors = tensorfile.read(path)
        return StoredFile(path, _unwrapped(tensors), file_sha256(path), metadata=metadata)
    if pickles.looks_like(head):
        tensors, arguments = pickles.read(path)
        return StoredFile(path, _unwrapped(tensors), file_sha256(path), arguments=arguments)
    raise CheckpointError(f"{path}: not a checkpoint ({_guess(head)}). Give a .pth or .safetensors file.")


def file_sha256(path: Path) -> str:
    """Hex digest of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the names of wrappers that stand before every weight's, one in another."""
    for _ in range(_MOST_WRAPPERS):
        weights = [name for name in tensors if not is_counter(name) and not name.startswith("criterion.")]
        wrapper = next((match[0] for name in weights if (match := _WRAPPER.match(name))), None)
        if wrapper is None or not all(name.startswith(wrapper) for name in weights):
            break
        tensors = {
            name.removeprefix(wrapper): tensor
            for name, tensor in tensors.items()
            if not name.startswith("criterion.")
        }
    return tensors


def _head(path: Path) -> bytes:
    """The first bytes of a regular file, opened so that a pipe or device cannot make us wait."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file. Check the path, or try --model demo.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the path and its rights.") from error
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path}: a folder, not a checkpoint. Give the file inside it.")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file (a pipe, socket or device). Give a checkpoint file.")
        if status.st_size == 0:
            raise CheckpointError(f"{path}: truncated or damaged (0 bytes). Copy or download it again.")
        if status.st_size > MAX_BYTES:
            raise CheckpointError(
                f"{path}: too large to be a detector ({status.st_size} bytes, limit {MAX_BYTES}). Give another file."
            )
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _guess(head: bytes) -> str:
    """What a file that is no checkpoint seems to be."""
    start = head.lstrip().lower()
    if head.startswith(_LFS):
        return "a Git LFS pointer: run git lfs pull to fetch the real file"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "an HTML page, perhaps an error message saved by a download"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head.startswith(b"\x1f\x8b"):
        return "gzip-compressed: unpack it first"
    if _is_text(head):
        return "a text file"
    if len(head) < 64:
        return f"truncated or damaged, {len(head)} bytes"
    return "unknown content"


def _is_text(head: bytes) -> bool:
    try:
        # Incremental: the last character may be cut in half.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(character.isprintable() or character in "\t\r\n\f\x1b" for character in text)
