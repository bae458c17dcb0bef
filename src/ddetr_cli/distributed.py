"""The processes of one run, as torchrun (or a batch script) starts them: who they are, and what they agree on.

Each finds itself in the standard environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Without them a
run is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ddetr_cli.errors import DeviceError, UsageError

T = TypeVar("T")


class Ranks:
    """This process (``index`` of ``count``) and what it does together with the others.

    Every method but ``is_main`` must be called by all of them, in the same order. They raise DeviceError where
    another one has gone.
    """

    def __init__(self, index: int = 0, count: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.index, self.count = index, count
        self._host = group  # for what lies in host memory; tensors of a GPU go through the default group

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.index == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of each value over all processes."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with others_alive():
            dist.all_reduce(tensor, group=self._host)
        return tensor.tolist()

    def mean_(self, tensor: Tensor) -> None:
        """Replace ``tensor``, on the training's device, by its mean over all processes."""
        if self.count > 1:
            with others_alive():
                dist.all_reduce(tensor)
            tensor /= self.count

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every process, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with others_alive():
            dist.all_gather_object(found, value, group=self._host)
        return found

    def from_main(self, value: T) -> T:
        """The main process' ``value``."""
        if self.count == 1:
            return value
        box = [value]
        with others_alive():
            dist.broadcast_object_list(box, src=0, group=self._host)
        return box[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block is run by the main process, then by the others: what it downloads is there for them."""
        if not self.is_main:
            self.from_main(None)
        yield
        if self.is_main:
            self.from_main(None)


@contextmanager
def others_alive() -> Iterator[None]:
    """Turns what torch raises when another process of the training has gone into a DeviceError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(
            sign in text for sign in ("gloo", "NCCL", "Connection closed", "Connection reset", "ProcessGroup")
        ):
            raise
        raise DeviceError(
            f"this run: another of its processes has ended or does not answer ({text.splitlines()[0][:200]}). "
            "Its own last message says why."
        ) from error


def world() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) from the environment. Raises UsageError for nonsense."""
    values = []
    for name, absent in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name) or str(absent)
        if not text.isdecimal():
            raise UsageError(f"{name}={text}: not a number. Start with torchrun, or unset it.")
        values.append(int(text))
    rank, count, local = values
    if rank >= max(count, 1) or local > rank:
        raise UsageError(f"RANK={rank}, WORLD_SIZE={count}, LOCAL_RANK={local}: impossible. Start with torchrun.")
    return rank, max(count, 1), local


def device_name(name: str) -> str:
    """Which device this process asks for: with several on a machine, each its own GPU. Raises UsageError."""
    _, count, local = world()
    if count == 1 or name == "cpu":
        return name
    if name.startswith("cuda:"):
        raise UsageError(f"--device {name}: not with several processes, each takes its own. Use --device cuda.")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > 1 and local >= gpus:
        raise UsageError(f"LOCAL_RANK={local}: this machine has {gpus} GPUs. Start as many processes on it.")
    if gpus == 1:
        return "cuda:0"  # a scheduler shows each process its own GPU only
    return f"cuda:{local}" if gpus or name == "cuda" else "cpu"


@contextmanager
def open_ranks(device: torch.device, *, patience: timedelta | None = None) -> Iterator[Ranks]:
    """The processes of this run, connected while the block runs; ``patience``: how long they wait for each other.

    Raises DeviceError where they do not meet.
    """
    rank, count, _ = world()
    if count == 1:
        yield Ranks()
        return
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if is_cuda else "gloo", timeout=patience)
        host: Any = dist.new_group(backend="gloo") if is_cuda else None
    except (RuntimeError, ValueError) as error:
        raise DeviceError(
            f"this run: its {count} processes do not find each other ({str(error).splitlines()[0][:200]}). "
            "Start with torchrun, or set MASTER_ADDR and MASTER_PORT."
        ) from error
    try:
        yield Ranks(rank, count, host)
    finally:
        dist.destroy_process_group()
