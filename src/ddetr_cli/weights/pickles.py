"""Files written by ``torch.save``: the authors' checkpoints and Hugging Face's ``.bin``.

A pickle is a program. It is read by PyTorch's restricted reader only, which builds tensors and plain containers; the
one class added is ``argparse.Namespace``, because the authors store their command line that way. The archive around
it is examined first: PyTorch would inflate a 3 MB zip bomb to gigabytes before noticing.
"""

from __future__ import annotations

import argparse
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr_cli.errors import CheckpointError

# Before 1.6 torch.save wrote this magic number, pickled, then pickles and raw storages one after another.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PROTOCOLS = tuple(bytes((0x80, version)) for version in range(2, 6))
_MAX_PROGRAM = 64 << 20  # bytes of data.pkl; a checkpoint with optimizer has well under one mebibyte
_ZIP_OVERHEAD = 1 << 20  # records may add up to no more than the file plus this
_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
           torch.int8, torch.uint8, torch.bool}  # fmt: skip
_STATE_KEYS = ("model", "state_dict", "model_state_dict")
_CODE = {"posix", "nt", "os", "subprocess", "sys", "shutil", "socket", "runpy", "importlib", "pty", "builtins",
         "__builtin__", "commands", "webbrowser", "ctypes", "operator", "functools", "types", "code"}  # fmt: skip
_HARMLESS = re.compile(
    r"torch\.(_utils\._rebuild_\w+|storage\.\w+|\w*Storage|Size|device|dtype|float\d+|bfloat16|u?int\d+|bool|Tensor)"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|(__builtin__|builtins)\.(set|frozenset|bytearray|complex|slice|range|object|int|float|str|bool|bytes|list|dict)"
    r"|collections\.\w+|argparse\.Namespace|_codecs\.encode"
)


def looks_like(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a zip archive or a pickle."""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06", *_PROTOCOLS))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and stored arguments of a ``torch.save`` file. Raises CheckpointError with the reason."""
    _check_torch_version(path)
    with path.open("rb") as file:
        head = file.read(len(_LEGACY_MAGIC))
    is_zip = head.startswith(b"PK")
    if is_zip:
        program = _check_zip(path)
    elif head == _LEGACY_MAGIC:
        program = b""
    else:
        classes = _foreign_classes(_read_some(path))
        if classes:
            raise _refusal(path, classes)
        raise CheckpointError(
            f"{path}: a plain pickle, not a checkpoint (torch.save did not write it, or it is damaged). "
            "Give a .pth or .safetensors file."
        )
    try:
        loaded = _load(path, is_zip)
    except Exception as error:  # a hostile file can raise anything; PyTorch's own text advises to disable the guard
        classes = _foreign_classes(program or _read_some(path))
        if classes:
            raise _refusal(path, classes) from error
        raise _damaged(path) from error
    state, arguments = _state_dict(path, loaded)
    return {str(name): _plain(path, name, value) for name, value in state.items()}, arguments


def _load(path: Path, is_zip: bool) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Given a path, torch.load believes its suffix; given an open file it cannot map it.
        if is_zip and path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def _check_torch_version(path: Path) -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 10):
        raise CheckpointError(
            f"{path}: not read with torch {torch.__version__} (its restricted reader can be made to run code: "
            "CVE-2025-32434, CVE-2026-24747). Install torch 2.10 or newer, or give a safetensors file."
        )


def _check_zip(path: Path) -> bytes:
    """The pickle inside the archive, once the archive is known to hold what a checkpoint holds and no more."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            programs = [r for r in records if r.filename.count("/") == 1 and r.filename.endswith("/data.pkl")]
            if any(r.filename.endswith("/constants.pkl") for r in records):
                raise CheckpointError(
                    f"{path}: a TorchScript archive (a program, not weights). Give the weights themselves."
                )
            if len(programs) != 1:
                raise CheckpointError(
                    f"{path}: not a checkpoint (a zip archive without data.pkl). Give a .pth or .safetensors file."
                )
            if any(r.compress_type != zipfile.ZIP_STORED for r in records):
                raise CheckpointError(
                    f"{path}: refused (compressed records, which torch.save never writes: perhaps a zip bomb). "
                    "Give the original file."
                )
            if sum(r.file_size for r in records) > size + _ZIP_OVERHEAD or programs[0].file_size > _MAX_PROGRAM:
                raise CheckpointError(
                    f"{path}: refused (its records claim more than its {size} bytes). Give the original file."
                )
            return archive.read(programs[0])
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise _damaged(path) from error


def _state_dict(path: Path, loaded: Any) -> tuple[Mapping[Any, Any], dict[str, Any]]:
    """The mapping of weights in what was stored, and the plain values of the arguments beside it."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not weights. Give a checkpoint.")
    arguments = loaded.get("args")
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    plain = values.items() if isinstance(values, dict) else ()
    known: dict[str, Any] = {
        str(key): value for key, value in plain if isinstance(value, (bool, int, float, str))
    } | _class_names(loaded.get("meta"))
    for key in _STATE_KEYS:
        if isinstance(loaded.get(key), Mapping):
            return loaded[key], known
    return loaded, known


def _class_names(meta: Any) -> dict[str, tuple[str, ...]]:
    """mmdetection's class names, under one name for all its versions."""
    tables = [meta, meta.get("dataset_meta")] if isinstance(meta, dict) else []
    for table in tables:
        for key in ("classes", "CLASSES"):
            names = table.get(key) if isinstance(table, dict) else None
            if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
                return {"class_names": tuple(names)}
    return {}


def _plain(path: Path, name: Any, value: Any) -> Tensor:
    """``value`` if it is an ordinary tensor that its storage really holds."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise CheckpointError(
            f"{path}: holds {str(name)[:80]!r} of type {type(value).__name__} among its weights. Give a checkpoint."
        )
    is_plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    if not is_plain or value.dtype not in _DTYPES:
        what = f"of {value.dtype}" if is_plain else "sparse, quantized or without numbers"
        raise CheckpointError(f"{path}: tensor {name[:80]!r} is {what}. Give plain weights.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: tensor {name[:80]!r} claims {value.numel() * value.element_size()} bytes and stores "
            f"{value.untyped_storage().nbytes()} (an expanded view). Give the original file."
        )
    return value.detach()


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: truncated or damaged ({path.stat().st_size} bytes). Copy or download it again.")


def _refusal(path: Path, classes: list[str]) -> CheckpointError:
    code = [name for name in classes if name.split(".")[0] in _CODE]
    if code:
        return CheckpointError(
            f"{path}: contains code ({', '.join(code[:3])}), refused. Do not trust it: get the weights elsewhere."
        )
    return CheckpointError(
        f"{path}: contains objects that are not weights ({', '.join(classes[:3])}), refused. "
        "Give a file with the weights alone, best as safetensors."
    )


def _read_some(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_PROGRAM)


def _foreign_classes(program: bytes) -> list[str]:
    """Names a pickle would import that no checkpoint needs, found by reading it, not by running it."""
    found: dict[str, None] = {}
    for name in _imports(program):
        if not _HARMLESS.fullmatch(name):
            found.setdefault(name)
    return list(found)


def _imports(program: bytes) -> Iterator[str]:
    offset, strings, memo = 0, [""], dict[Any, str]()
    # A legacy file is several pickles in a row; each ends with STOP, and the last is followed by raw numbers.
    while offset < len(program):
        end, pushed = offset, ""
        try:
            for opcode, argument, position in pickletools.genops(program[offset:]):
                if opcode.name == "GLOBAL":
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                if opcode.name == "MEMOIZE":
                    memo[len(memo)] = pushed
                elif opcode.name in ("BINPUT", "LONG_BINPUT"):
                    memo[argument] = pushed
                else:
                    is_get = opcode.name in ("BINGET", "LONG_BINGET")
                    pushed = memo.get(argument, "") if is_get else argument if isinstance(argument, str) else ""
                    strings = [*strings[-7:], pushed] if pushed else strings
                end = offset + (position or 0) + 1
        except Exception:  # not a pickle, or damaged: what was seen so far counts
            return
        offset, memo = end, {}
