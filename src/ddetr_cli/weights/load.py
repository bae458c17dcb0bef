"""From a ``--model`` value to a model that runs: find, read, recognise, fit, report.

Every tensor of the model must come from the file and every tensor of the file must go somewhere: a model that is
almost loaded detects almost nothing and says so nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddetr_cli.classes import ClassTable
from ddetr_cli.errors import CheckpointError
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DetectionModel
from ddetr_cli.presets import DEFORMABLE_DETR, PRESETS, ModelConfig, get_preset
from ddetr_cli.weights import layouts
from ddetr_cli.weights.checkpoint import parse_header
from ddetr_cli.weights.facts import IMAGE_SIZE_KEY, OTHER_SIZE_KEY, class_table, facts_about, other_model_type
from ddetr_cli.weights.hub import HUB_FILES, PUBLISHED, Announce, Found, find_model
from ddetr_cli.weights.reader import StoredFile, read_file
from ddetr_cli.weights.recognition import config_of, describe, describe_foreign

SHOWN = 5  # names listed of each kind in an error
# A model may need so many more numbers than its file holds: more than any preset has, so that a file that lacks parts
# of one is told which.
SPARE_NUMBERS = 100_000_000


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

    model: DetectionModel
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
    model = _skeleton(weights)
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

    recognised = layouts.recognise(stored.tensors)
    # Beside a file of another name, the configuration may be another model's.
    other = other_model_type(stored.path) if stored.path.name in HUB_FILES else None
    if recognised is None or (recognised[0] == layouts.HUGGING_FACE and other is not None and preset is None):
        what = [describe_foreign(stored.tensors)] if recognised is None else []
        what += [] if other is None else [f"{stored.path.with_name('config.json')} calls it {other!r}"]
        raise CheckpointError(
            f"{stored.path}: not a model read here ({'; '.join(what)}). "
            "Give a Deformable DETR, a DETR or torchvision's Faster R-CNN."
        )
    layout, family = recognised
    facts = facts_about(stored, hugging_face_family=family if layout == layouts.HUGGING_FACE else None)
    published = _published(stored)
    try:
        tensors, decoder_has_heads = layouts.to_ours(stored.tensors, layout, family)
        config, notes = config_of(
            tensors,
            facts,
            family=family,
            decoder_has_heads=decoder_has_heads,
            preset=preset or found.preset or published,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{stored.path}: {error}") from error
    if family == DEFORMABLE_DETR:
        if config.refine_boxes and layout == layouts.HUGGING_FACE:
            tensors = layouts.every_head(tensors)
        elif not config.refine_boxes and layouts.heads_are_shared(tensors):
            tensors = layouts.one_head(tensors)
    if published is None:
        notes.append("carries no checksum, so damage to its numbers would not be noticed")
    if OTHER_SIZE_KEY in facts:
        notes.append(
            f"was made for pictures of {facts[OTHER_SIZE_KEY]} (preprocessor_config.json), a rule not followed here: "
            f"the short side is {config.image_size} px unless --image-size says otherwise, the long one at most "
            "1333/800 of it"
        )
    elif layout == layouts.HUGGING_FACE and IMAGE_SIZE_KEY not in facts and found.preset is None and preset is None:
        notes.append(
            "nothing beside the file says what size its pictures had: the short side is "
            f"{config.image_size} px unless --image-size says otherwise"
        )
    ignored = tuple(name for name in stored.tensors if layouts.is_counter(name))
    classes = class_table(config.classes, facts, is_contiguous=layout in (layouts.DETREX, layouts.MMDETECTION))
    return _Weights(tensors, config, classes, layout, ignored, tuple(f"{stored.path}: {n}" for n in notes), stored)


def _published(stored: StoredFile) -> str | None:
    """The preset of a file its authors published with a checksum in its name, told by the checksum.

    Raises CheckpointError for such a name on a file with another checksum.
    """
    for stem, preset in PUBLISHED.items():
        digits = stem.rpartition("-")[2]
        if stored.sha256.startswith(digits):
            return preset
        if stored.path.stem == stem and stored.path.suffix == ".pth":
            raise CheckpointError(
                f"{stored.path}: damaged (its sha256 does not begin with {digits}). Delete it, and download it again."
            )
    return None


def _skeleton(weights: _Weights) -> DetectionModel:
    """The model before any number of it is known: memory it hardly touches, for every tensor comes from the file.

    Not on the meta device: torch computes there in Python, and importing what that takes (torch._dynamo, sympy)
    lasts as long as importing all the rest of torch. Raises CheckpointError for a file whose configuration needs far
    more than it holds.
    """
    held = sum(tensor.numel() for tensor in weights.tensors.values())
    try:
        with _Unwritten(2 * held + SPARE_NUMBERS):
            return build_detector(weights.config)
    except _TooManyNumbers as error:
        raise CheckpointError(
            f"{weights.stored.path}: damaged or hostile (it describes a model many times larger than the {held} "
            "numbers it holds). Get the weights elsewhere."
        ) from error


# Those of torch.nn.init are seen instead of the tensor's own method that they call.
_DRAWS = {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_,
          nn.init.kaiming_normal_}  # fmt: skip


class _TooManyNumbers(Exception):
    """A model under construction has grown beyond its limit."""


class _Unwritten(TorchFunctionMode):
    """Inside, random initialisation leaves a tensor as it is, and ``limit`` numbers at most are made room for."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._left = limit

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        result = func(*args, **(kwargs or {}))
        # Linear layers, convolutions and embeddings are made of these; what copies them has the room of a copy.
        if func is torch.empty:
            self._left -= result.numel()
            if self._left < 0:
                raise _TooManyNumbers
        return result


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
