"""ddetr: object detection with Deformable DETR (arXiv:2010.04159), from the command line and from Python.

from ddetr_cli import Detector, draw

found = Detector("r50").detect("street.jpg")
draw("street.jpg", found).save("found.jpg")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddetr_cli.detect.drawing import draw
    from ddetr_cli.errors import DdetrError
    from ddetr_cli.inference.detector import Detector
    from ddetr_cli.inference.results import Box, Detection, Detections

    __version__: str

__all__ = ["Box", "DdetrError", "Detection", "Detections", "Detector", "__version__", "draw"]

_HOMES = {
    "Box": "inference.results",
    "DdetrError": "errors",
    "Detection": "inference.results",
    "Detections": "inference.results",
    "Detector": "inference.detector",
    "draw": "detect.drawing",
}


def __getattr__(name: str) -> Any:
    # Looked up on demand: the command line must answer without importing torch, and reading the installed metadata
    # costs more than all of ``ddetr --help`` besides.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ddetr-cli")
    except PackageNotFoundError:  # a source tree on PYTHONPATH, not installed
        return "0+unknown"
