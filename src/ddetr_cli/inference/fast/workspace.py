"""One block of memory that every run of the fast path computes in, and where in it what lies.

Fresh memory costs a page fault per 4 KiB, more than the arithmetic on it. So buffers are places in a block that is
kept from image to image and grows to what the largest one needs. Buffers whose lives do not overlap share a place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ddetr_cli.ops.dense import DenseEngine, Map, huge_buffer
from ddetr_cli.ops.dense_abi import Crew

_ALIGNMENT = 4096

Step = Callable[[], object]


class PartStep(NamedTuple):
    """A step, and the part of the model that it computes."""

    part: str
    run: Step


class Workspace:
    """The block; ``version`` changes when it moves, and what was prepared with its addresses is then void."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.version = 0

    def hold(self, size: int) -> None:
        """Have at least ``size`` bytes."""
        if size > self.memory.numel():
            # The old block goes first: both at once would be the peak of the run.
            self.memory = torch.empty(0, dtype=torch.uint8)
            self.memory = huge_buffer(size)
            self.version += 1


@dataclass(frozen=True)
class Place:
    """A buffer of the plan: a name that stands for memory, and how it is seen here."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    border: int = 0  # of a map (height, width, channels), on all four sides

    @property
    def bytes(self) -> int:
        """What it takes, border and alignment included."""
        if not self.border:
            count = math.prod(self.shape)
        else:
            height, width, channels = self.shape
            count = (height + 2 * self.border) * (width + 2 * self.border) * channels
        return -(-count * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


@dataclass
class Plan:
    """The steps of one image size, in order, drawn up before it is known where their buffers lie.

    Buffers of one phase lie beside each other, those of another phase over them; the phase ``""`` is under none.
    """

    engine: DenseEngine
    threads: int
    workspace: Workspace
    phase: str = ""
    part: str = ""  # of the model, which steps that are added belong to
    _sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    _seen: dict[str, Place] = field(default_factory=dict)
    _pending: list[tuple[str, Callable[[], Step]]] = field(default_factory=list)
    _offsets: dict[str, int] = field(default_factory=dict)
    _crew: Crew | None = None

    def place(self, name: str, *shape: int, border: int = 0, dtype: torch.dtype | None = None) -> Place:
        """A buffer called ``name`` in the current phase, shared with earlier ones of that name.

        A border is zeroed when the buffer was last seen as something else.
        """
        place = Place(name, shape, self.engine.dtype if dtype is None else dtype, border)
        sizes = self._sizes.setdefault(self.phase, {})
        sizes[name] = max(sizes.get(name, 0), place.bytes)
        if border and self._seen.get(name) != place:
            self.add(lambda: self._clear_border(place))
        self._seen[name] = place
        return place

    def add(self, prepare: Callable[[], Step]) -> None:
        """Another step: ``prepare`` gives it once places have addresses."""
        self._pending.append((self.part, prepare))

    def prepare(self, scratch_bytes: int) -> list[PartStep]:
        """The steps, ready to run, with so much scratch for each thread; makes room in the workspace."""
        end = 0
        for phase in sorted(self._sizes):
            kept = 0 if phase == "" else self._end_of("")
            offset = kept
            for name, size in self._sizes[phase].items():
                self._offsets[name] = offset
                offset += size
            end = max(end, offset)
        self.workspace.hold(end + self.threads * scratch_bytes)
        scratch = self.workspace.memory[end : end + self.threads * scratch_bytes]
        self._crew = self.engine.crew(self.threads, scratch)
        return [PartStep(part, prepare()) for part, prepare in self._pending]

    # ---- once prepared ----

    @property
    def crew(self) -> Crew:
        """The threads the steps run on."""
        assert self._crew is not None
        return self._crew

    def tensor(self, place: Place) -> Tensor:
        """The memory of a place without border."""
        offset = self._offsets[place.name]
        count = math.prod(place.shape) * place.dtype.itemsize
        return self.workspace.memory[offset : offset + count].view(place.dtype).view(place.shape)

    def map(self, place: Place) -> Map:
        """The memory of a place as a feature map."""
        height, width, channels = place.shape
        line = (width + 2 * place.border) * channels
        inset = place.border * (line + channels) * place.dtype.itemsize
        address = self.workspace.memory.data_ptr() + self._offsets[place.name] + inset
        return Map(address, height, width, channels, place.border)

    def _end_of(self, phase: str) -> int:
        return sum(self._sizes.get(phase, {}).values())

    def _clear_border(self, place: Place) -> Step:
        height, width, channels = place.shape
        b = place.border
        whole = self.tensor(Place(place.name, (height + 2 * b, width + 2 * b, channels), place.dtype))
        edges = (whole[:b], whole[-b:], whole[:, :b], whole[:, -b:])

        def clear() -> None:
            for edge in edges:
                edge.zero_()

        return clear
