"""Text files of other people, read whole, with a sentence that says where one is not UTF-8."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from ddetr_cli.errors import DatasetError


def read_utf8(path: Path, kind: str, *, max_bytes: int | None = None) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark, that is to be ``kind``: JSON, YAML ....

    Raises DatasetError naming the encoding, the line and column, or why the file cannot be read.
    """
    try:
        # Checked first: opening a pipe would wait for a writer.
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DatasetError(f"{path}: not a regular file (a folder, pipe, socket or device). Give a {kind} file.")
        if max_bytes is not None and found.st_size > max_bytes:
            raise DatasetError(f"{path}: too large ({found.st_size} bytes). Give another.")
        raw = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error
    if raw.startswith(b"version https://git-lfs"):
        raise DatasetError(f"{path}: not {kind} (it is a Git LFS pointer). Run git lfs pull to fetch the real file.")
    return _text(path, raw)


def _text(path: Path, raw: bytes) -> str:
    encoding = json.detect_encoding(raw)
    if encoding not in ("utf-8", "utf-8-sig"):
        raise DatasetError(f"{path}: encoded as {encoding.upper()}, not UTF-8. Save it as UTF-8.")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise DatasetError(
            f"{path}: line {line}, column {column}: byte 0x{raw[error.start]:02x} is not UTF-8 (perhaps Latin-1). "
            "Save it as UTF-8."
        ) from error
