"""ddetr: object detection with Deformable DETR (arXiv:2010.04159), from the command line and from Python."""

from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    # Looked up on demand: reading the installed metadata costs more than all of ``ddetr --help`` besides.
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ddetr-cli")
    except PackageNotFoundError:  # a source tree on PYTHONPATH, not installed
        return "0+unknown"
