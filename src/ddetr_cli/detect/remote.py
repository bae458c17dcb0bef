"""Pictures behind URLs (https, s3, gs ...), through fsspec, where it is installed."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from ddetr_cli.errors import ImageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")
_INSTALL = "Run pip install 'ddetr-cli[remote]'"
# What a picture may hold in bytes; the rest of a server's answer is not even asked for.
_MOST_BYTES = 1 << 30


def is_url(source: str) -> bool:
    """Whether ``source`` is a URL rather than a path."""
    return _URL.match(source) is not None


@dataclass(frozen=True)
class Remote:
    """One picture behind a URL, fetched when it is its turn."""

    url: str

    def open(self) -> BinaryIO:
        """Its bytes. Raises ImageError."""
        try:
            file_system, path = _resolve(self.url)
            with file_system.open(path, "rb") as file:
                data = file.read(_MOST_BYTES)
        except UsageError as error:
            raise ImageError(str(error)) from error
        except Exception as error:  # every protocol has its own
            raise ImageError(f"{self.url}: cannot be fetched ({_why(error)}). Check it, and your access.") from error
        return io.BytesIO(data)


def find_remote(url: str) -> Iterator[tuple[str, str]]:
    """(URL, name) of each file that ``url``, perhaps a pattern or a folder, stands for, sorted.

    A name is host or bucket and path. Raises UsageError where the protocol is not installed or nothing answers.
    """
    is_http = url.lower().startswith(("http://", "https://"))  # which lists nothing, and has ? in its URLs
    if is_http or not (url.endswith("/") or any(c in url for c in "*?[")):
        _resolve(url)
        yield url, _name(url)
        return
    file_system, path = _resolve(url)
    try:
        found = file_system.find(path) if url.endswith("/") else file_system.glob(path)
    except Exception as error:
        raise UsageError(f"{url}: cannot be listed ({_why(error)}). Check it, and your access.") from error
    for one in sorted(found):
        whole = file_system.unstrip_protocol(one)
        yield whole, _name(whole)


def _resolve(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise UsageError(f"{url}: a URL (fsspec is not installed). {_INSTALL}.") from error
    try:
        file_system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"{url}: a URL that needs more ({error}). {_INSTALL}, or what is named.") from error
    except Exception as error:
        raise UsageError(f"{url}: not a URL that can be read ({_why(error)}). Check it.") from error
    return file_system, path


def _name(url: str) -> str:
    rest = url.partition("://")[2].partition("?")[0].partition("#")[0]
    parts = [part for part in rest.split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "picture"


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
