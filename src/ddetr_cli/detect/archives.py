"""Pictures inside tar archives, as WebDataset keeps them: read where they lie, nothing is unpacked."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator

ARCHIVE_SUFFIX = ".tar"
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


@dataclass(frozen=True)
class Member:
    """One file within an archive, by its place."""

    archive: Path
    offset: int
    size: int

    def open(self) -> BinaryIO:
        """Its bytes. Raises OSError where the archive has changed."""
        # One short read each: a handle kept open for every archive would soon be too many.
        with self.archive.open("rb") as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) < self.size:
            raise OSError(f"the archive ends within it; truncated by {self.size - len(data)} bytes")
        return io.BytesIO(data)


def members(archive: Path) -> Iterator[tuple[str, Member]]:
    """The names and places of the regular files in an uncompressed tar archive, in its order.

    Raises OSError or tarfile.TarError where it cannot be read; what came before that is good.
    """
    with tarfile.open(archive, "r:") as tar:
        kept: list[tarfile.TarInfo] = getattr(tar, "members", [])
        while (entry := tar.next()) is not None:
            if entry.isreg() and not entry.issparse():
                yield entry.name, Member(archive, entry.offset_data, entry.size)
            kept.clear()  # it would keep every entry


def is_safe(name: str) -> bool:
    """Whether a member's name stays below the folder that mirrors its archive."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)
