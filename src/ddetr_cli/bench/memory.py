"""The most memory a model takes: of a process of its own on the CPU, of the device on a GPU."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from ddetr_cli.bench.subjects import Subject, open_model, random_pixels
from ddetr_cli.bench.tables import Silence


def peak_process_memory(
    name: str, size_hw: tuple[int, int], precision: str, threads: int, *, status: Path = Path("/proc/self/status")
) -> int | None:
    """Bytes resident at most while a fresh process imports, opens the model ``name`` and runs one picture on the CPU.

    None where the system does not say.
    """
    # Spawned: a forked process would begin with what this one holds.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return alone.submit(_run_and_weigh, name, size_hw, precision, threads, status).result()


def _run_and_weigh(name: str, size_hw: tuple[int, int], precision: str, threads: int, status: Path) -> int | None:
    torch.set_num_threads(threads)
    Subject(open_model(name, Silence()), precision, torch.device("cpu"), random_pixels(size_hw, 1), Silence()).run()
    return peak_resident_bytes(status)


def peak_resident_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """The most memory this process ever held (ru_maxrss may be its parent's); None where the system does not say."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
