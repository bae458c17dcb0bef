"""From a ``--model`` value to a model that runs: find, read, recognise, fit, report.

Every tensor of the model must come from the file and every tensor of the file must go somewhere: a model that is
almost loaded detects almost nothing and says so nowhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr_cli.classes import COCO_NAMES, COCO_TABLE, ClassTable
from ddetr_cli.errors import CheckpointError
from ddetr_cli.model.detector import DeformableDetr, build_detector
from ddetr_cli.presets import PRESETS, ModelConfig, get_preset
from ddetr_cli.weights import layouts
from ddetr_cli.weights.checkpoint import parse_header
from ddetr_cli.weights.hub import Announce, Found, find_model
from ddetr_cli.weights.reader import StoredFile, read_file
from ddetr_cli.weights.recognition import config_of, describe, describe_foreign

SHOWN = 5  # names listed of each kind in an error


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors. ``notes`` are sentences a user should see whatever the verbosity."""

    source: Path
    layout: str
    preset: str
    loaded: int
    missing: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()  # "name: (2, 256) in the file, (4, 256) in the model"
    ignored: tuple[str, ...] = ()  # counters of training tools, and tensors a new data set starts afresh
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether nothing was missing, left over or of another shape."""
        return not (self.missing or self.left_over or self.wrong_shape)

    def table(self, shown: int = SHOWN) -> list[str]:
        """The report as lines of text: one per fact, then up to ``shown`` names of each kind that did not fit."""
        rows = [("file", str(self.source)), ("layout", self.layout), ("variant", self.preset)]
        kinds = (("missing", self.missing), ("left over", self.left_over), ("wrong shape", self.wrong_shape))
        rows += [("loaded", f"{self.loaded} tensors"), *((kind, str(len(names))) for kind, names in kinds)]
        rows += [("ignored", str(len(self.ignored)))]
        lines = [f"{kind:<12}{value}" for kind, value in rows]
        for kind, names in kinds:
            lines += [f"  {kind}: {name}" for name in names[:shown]]
            lines += [f"  {kind}: and {len(names) - shown} more"] if len(names) > shown else []
        return lines


@dataclass(frozen=True)
class LoadedModel:
    """A detector ready to run (evaluation mode, CPU, float32) with all that its file said about it."""

    model: DeformableDetr
    config: ModelConfig
    classes: ClassTable
    report: LoadReport
    source: Path
    sha256: str


@dataclass(frozen=True)
class _Weights:
    """A file's tensors under our names, and the model they are for."""

    tensors: dict[str, Tensor]
    config: ModelConfig
    classes: ClassTable
    layout: str
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    stored: StoredFile


def load_model(spec: str, *, preset: str | None = None, announce: Announce | None = None) -> LoadedModel:
    """The detector behind ``spec``: an existing file or run folder, else ``demo``, a preset, or a hub id.

    ``preset`` says which variant the file holds where the file cannot (DC5). ``announce`` is told before a download.
    Raises CheckpointError for a file that is absent, unsafe, damaged or of another architecture, UsageError for a URL
    or an unknown preset.
    """
    if preset is not None:
        get_preset(preset)
    weights = _read(find_model(spec, announce), preset)
    model = _skeleton(weights.config)
    state, report = _fit(weights, model.state_dict())
    if not report.fits:
        raise _wrong(weights, report)
    model.load_state_dict(state, strict=False, assign=True)
    model.eval()
    return LoadedModel(model, weights.config, weights.classes, report, weights.stored.path, weights.stored.sha256)


def _read(found: Found, preset: str | None) -> _Weights:
    """Read a file and recognise what it holds."""
    stored = read_file(found.path)
    header = parse_header(stored)
    if header is not None:
        config = header.config
        if preset is not None and preset != config.preset:
            config = replace(
                PRESETS[preset], classes=config.classes, queries=config.queries, image_size=config.image_size
            )
        return _Weights(stored.tensors, config, header.classes, layouts.OURS, (), (), stored)

    layout = layouts.recognise(stored.tensors)
    if layout is None:
        raise CheckpointError(
            f"{stored.path}: not a Deformable DETR ({describe_foreign(stored.tensors)}). Give another checkpoint."
        )
    facts = _hub_config(stored.path) if layout == layouts.HUGGING_FACE else stored.arguments
    try:
        tensors, decoder_has_heads = layouts.to_ours(stored.tensors, layout)
        config, notes = config_of(tensors, facts, decoder_has_heads=decoder_has_heads, preset=preset or found.preset)
    except CheckpointError as error:
        raise CheckpointError(f"{stored.path}: {error}") from error
    if config.refine_boxes and layout == layouts.HUGGING_FACE:
        tensors = layouts.every_head(tensors)
    elif not config.refine_boxes and layouts.heads_are_shared(tensors):
        tensors = layouts.one_head(tensors)
    notes = [f"{stored.path}: {note}" for note in notes]
    notes.append(f"{stored.path}: carries no checksum, so damage to its numbers would not be noticed")
    ignored = tuple(name for name in stored.tensors if layouts.is_counter(name))
    return _Weights(tensors, config, _classes(config.classes, facts), layout, ignored, tuple(notes), stored)


def _hub_config(path: Path) -> Mapping[str, Any]:
    """The ``config.json`` beside a Hugging Face file, or nothing where there is none of this architecture."""
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) and config.get("model_type") == "deformable_detr" else {}


def _classes(count: int, facts: Mapping[str, Any]) -> ClassTable:
    """The class table of a file that stores none: COCO's for 91 logits, else Hugging Face's names where given.

    91 classes of somebody else's are told by their names: none is one of COCO's, nor Hugging Face's LABEL_0.
    """
    names = facts.get("id2label")
    if not isinstance(names, dict) or len(names) != count:
        names = {}
    given = [name if isinstance(name := names.get(str(index)), str) else None for index in range(count)]
    known = {*COCO_NAMES.values(), "LABEL_0", None}
    if count == len(COCO_TABLE) and not known.isdisjoint(given):
        return COCO_TABLE
    return ClassTable(tuple(range(count)), tuple(given))


def _skeleton(config: ModelConfig) -> DeformableDetr:
    """The model without memory or random numbers: every tensor of it will come from the file."""
    with torch.device("meta"):
        return build_detector(config)


def _fit(weights: _Weights, target: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    """Copies of the tensors that have a place in ``target``, in its dtypes, and the report on all of them."""
    state: dict[str, Tensor] = {}
    left_over, wrong = [], []
    for name, tensor in weights.tensors.items():
        place = target.get(name)
        if place is None:
            left_over.append(name)
        elif place.shape != tensor.shape or place.is_floating_point() != tensor.is_floating_point():
            wrong.append(f"{name}: {_kind(tensor)} in the file, {_kind(place)} in the model")
        else:
            state[name] = tensor.to(place.dtype, copy=True).contiguous()
    missing = [name for name in target if name not in weights.tensors and not layouts.is_counter(name)]
    path = weights.stored.path
    for name, tensor in state.items():
        # The largest magnitude is NaN where any number is.
        if tensor.is_floating_point() and not math.isfinite(float(tensor.abs().amax()) if tensor.numel() else 0.0):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity (training diverged, or the file is damaged). "
                "Give an earlier checkpoint."
            )
    report = LoadReport(
        path,
        weights.layout,
        weights.config.preset,
        len(state),
        tuple(missing),
        tuple(left_over),
        tuple(wrong),
        weights.ignored,
        weights.notes,
    )
    return state, report


def _wrong(weights: _Weights, report: LoadReport) -> CheckpointError:
    """The refusal of a file whose tensors are not the model's, with up to five names of each kind."""
    kinds = (("missing", report.missing), ("left over", report.left_over), ("of another shape", report.wrong_shape))
    parts = [f"{len(names)} {kind} ({_list(names)})" for kind, names in kinds if names]
    wanted = report.preset if report.preset in PRESETS else "the model that most of it describes"
    return CheckpointError(
        f"{report.source}: does not fit {wanted} ({describe(weights.tensors)}): {'; '.join(parts)}. "
        "Give a whole checkpoint of this model, or name another variant with --preset."
    )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else ' of integers'}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
