"""The C library's allocator, which decides what large fresh tensors cost, and so what a comparison says.

By default glibc gives large blocks back to the system at once and takes them anew, page by page, at every use.
Programs that allocate much (eager PyTorch) then wait for the system more than those that keep their memory. A ratio
between two programs is therefore taken twice: with the default, and with the settings below for both. They are read
when a process starts, so measuring with them means starting again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

# Keep everything, and ask for huge pages.
TUNED = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=20000000000"

TUNABLES = "GLIBC_TUNABLES"
_OTHERS = ("LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_",
           "MALLOC_ARENA_MAX", "MALLOC_CONF", "THP_MEM_ALLOC_ENABLE")  # fmt: skip


def allocator_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables in force that change how memory is allocated."""
    return {name: environment[name] for name in (TUNABLES, *_OTHERS) if environment.get(name)}


def describe(settings: Mapping[str, str]) -> str:
    """``default``, ``tuned``, or the settings themselves."""
    if not settings:
        return "default"
    if settings == {TUNABLES: TUNED}:
        return "tuned"
    return " ".join(f"{name}={value}" for name, value in settings.items())


def environment_for(wanted: str, environment: Mapping[str, str] = os.environ) -> dict[str, str] | None:
    """The environment with the allocator ``default`` or ``tuned``; None where ``environment`` is that already."""
    if describe(allocator_settings(environment)) == wanted:
        return None
    changed = {name: value for name, value in environment.items() if name not in (TUNABLES, *_OTHERS)}
    if wanted == "tuned":
        changed[TUNABLES] = TUNED
    return changed


def start_again(environment: Mapping[str, str]) -> None:
    """Replace this process by the same command in another environment; does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(environment))
