"""Batches out of processes that read and augment, on machines that may allow fewer of those than asked for."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from ddetr_cli.errors import DdetrError, DeviceError
from ddetr_cli.train.dataset import Batch, TrainingSet, collate
from ddetr_cli.train.sampler import BatchSampler

SHARED_MEMORY = "/dev/shm"
_AHEAD = 2  # batches each process prepares in advance: torch's default
_LONG_SIDE = 1333 / 800  # of the short one: the widest picture a network sees
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Open files of a training before it reads anything, and of one process it talks to.
_OWN_FILES, _FILES_PER_WORKER = 64, 8


def usable_workers(wanted: int, images_per_batch: int, image_size: int, warn: Callable[[str], None]) -> int:
    """How many of ``wanted`` reading processes have the shared memory and file handles they need."""
    batch_bytes = images_per_batch * 3 * 4 * image_size * int(image_size * _LONG_SIDE)
    limits = {
        f"shared memory: {SHARED_MEMORY} has {_free_shared_memory() >> 20} MiB (docker run --shm-size, for one)": (
            _free_shared_memory() // (batch_bytes * (_AHEAD + 1))
        ),
        f"open files: the limit is {_open_files()} (ulimit -n)": (
            # Every tensor of a batch is a file of its own: two for an image, two for the batch.
            max(0, _open_files() - _OWN_FILES) // (_FILES_PER_WORKER + (_AHEAD + 1) * (2 * images_per_batch + 2))
        ),
    }
    workers = wanted
    for reason, most in limits.items():
        if most < workers:
            warn(f"{reason}, enough for {most} of {wanted} processes that read images; slower with those.")
            workers = most
    return workers


@contextmanager
def open_batches(
    data: TrainingSet, sampler: BatchSampler, *, workers: int, device: torch.device, warn: Callable[[str], None]
) -> Iterator[Iterator[Batch]]:
    """The batches of one epoch, while the block runs; the processes behind them end with it.

    On a GPU the next one is there, or on its way. Where no process can be started the pictures are read here. The
    iterator raises DatasetError, and DeviceError where a process was killed.
    """

    is_cuda = device.type == "cuda"

    def start(count: int) -> Iterator[Batch]:
        loader = DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=count,
            pin_memory=is_cuda,
            prefetch_factor=_AHEAD if count else None,
            # Not Python 3.14's default: a server between us and the readers would outlive both.
            multiprocessing_context="fork" if count else None,
            worker_init_fn=_leave_signals_to_the_parent if count else None,
        )
        on_child = signal.getsignal(signal.SIGCHLD)
        # Held back until the new processes have learnt to ignore them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # torch's handler would raise in the middle of a step, or of a save; the queue notices a death as well.
            if on_child is not None and on_child != signal.getsignal(signal.SIGCHLD):
                signal.signal(signal.SIGCHLD, on_child)

    others = set(multiprocessing.active_children())
    try:
        batches = start(workers)
    except OSError as error:
        if not workers or error.errno not in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC):
            raise
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join()
        warn(f"processes: none to be had for reading images ({error.strerror}); slower without.")
        batches = start(0)
    try:
        plain = _plain_errors(batches)
        yield sent_ahead(plain, SideStream(device)) if is_cuda else plain
    finally:
        del batches


class Sender(Protocol):
    """Takes batches to a device in two steps, between which they are on their way."""

    def send(self, batch: Batch) -> Any: ...
    def receive(self, sent: Any) -> Batch: ...


class SideStream:
    """The ``Sender`` to a GPU, which copies beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def send(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            return batch.to(self._device), self._stream.record_event()

    def receive(self, sent: tuple[Batch, torch.cuda.Event]) -> Batch:
        batch, arrival = sent
        now = torch.cuda.current_stream(self._device)
        now.wait_event(arrival)
        for tensor in (batch.pixels, batch.is_padding):
            if tensor is not None:
                tensor.record_stream(now)  # its memory is the other stream's, which must not use it again before
        return batch


def sent_ahead(batches: Iterator[Batch], sender: Sender) -> Iterator[Batch]:
    """``batches`` where ``sender`` takes them; each next one has been sent when one is handed out."""
    ahead: Any = None
    try:
        for batch in batches:
            before, ahead = ahead, sender.send(batch)
            if before is not None:
                yield sender.receive(before)
    except DdetrError:
        if ahead is not None:
            yield sender.receive(ahead)  # whole, whatever became of the next
        raise
    if ahead is not None:
        yield sender.receive(ahead)


def _plain_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except DdetrError as error:
        # torch puts the worker's traceback into the message; it ends with "<class>: <the message>".
        raise type(error)(str(error).rstrip().rpartition(f"{type(error).__name__}: ")[2]) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DeviceError(
            "training: a process that reads images (worker) was killed, probably out of memory. Use fewer --workers."
        ) from error


def _leave_signals_to_the_parent(_worker: int) -> None:
    # A terminal's Ctrl-C and a scheduler's SIGTERM reach every process; only the training knows when to stop.
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    torch.set_num_threads(1)


def _free_shared_memory() -> int:
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _open_files() -> int:
    """The limit of open files, after raising it as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
