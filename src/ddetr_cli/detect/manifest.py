"""``run.json``: what was run, with what, on what, how it went and how long it took. Times stand nowhere else."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr_cli.atomic import write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ddetr_cli.detect.journal import RunHeader
    from ddetr_cli.detect.results import RunSummary

MANIFEST_FILE = "run.json"
RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"
_PACKAGES = ("torch", "torchvision", "numpy", "pillow")


class Manifest:
    """The run.json of one run, over all the times it was resumed: written at its start, and again at its end."""

    def __init__(self, folder: Path, header: RunHeader, sources: Sequence[str], *, resumed: bool) -> None:
        self._path = folder / MANIFEST_FILE
        self._started = time.monotonic()
        earlier = read_manifest(folder) if resumed else {}
        sessions = earlier.get("sessions")
        self._session: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}
        self._values: dict[str, Any] = {
            "description": "ddetr detect",
            "state": RUNNING,
            "model": header.info.get("model"),
            "options": header.options,
            "format": header.formats,
            "sources": list(sources),
            "shard": list(header.shard),
            "images": header.images,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            "counts": {},
            "sessions": [*(sessions if isinstance(sessions, list) else []), self._session],
        }
        write_json(self._path, self._values)

    def close(self, summary: RunSummary | None, *, skipped: int = 0) -> None:
        """Write how it ended; no ``summary``: by an error. Raises OutputError."""
        self._session |= {"ended": _now(), "seconds": round(time.monotonic() - self._started, 3)}
        self._values["state"] = FINISHED if summary is not None and not summary.unfinished else STOPPED
        if summary is not None:
            self._session["done"] = summary.processed + summary.failed - summary.resumed
            self._values["counts"] = {
                "processed": summary.processed,
                "failed": summary.failed,
                "not_reached": summary.unfinished,
                "skipped": skipped,
                "detections": summary.detections,
                "dropped": summary.dropped,
            }
        write_json(self._path, self._values)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The run.json of ``folder``; nothing where there is none, or it is not one."""
    try:
        values = json.loads((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
