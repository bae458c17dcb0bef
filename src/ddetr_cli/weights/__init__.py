"""Weights of the world: finding them, reading them safely, recognising what they are, and our own checkpoints.

The names below are imported when first asked for, so that ``weights.hub``, which needs no torch, can say within
moments that a model is not there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddetr_cli.weights.backbone import load_backbone
    from ddetr_cli.weights.checkpoint import save_checkpoint
    from ddetr_cli.weights.load import LoadedModel, LoadReport, load_model

__all__ = ["LoadReport", "LoadedModel", "load_backbone", "load_model", "save_checkpoint"]

_HOMES = {"load_backbone": "backbone", "save_checkpoint": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'load')}"), name)
