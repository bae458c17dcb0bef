"""How many cores this process may use, and keeping torch to them. Importing this module does not import torch."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def available_cores(
    groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup"), affinity: int | None = None
) -> int:
    """Cores this process can keep busy: those it is bound to, or fewer where its container's quota says so.

    torch and OpenMP see the binding (taskset) but not the quota (docker --cpus, Kubernetes limits).
    """
    if affinity is None:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Rounded up: 1.5 cores are used better by two threads than by one.
    quotas = [math.ceil(quota) for quota in _quotas(groups, membership) if quota > 0]
    return max(1, min([affinity, *quotas]))


# How often GNU's OpenMP, PyTorch's thread pool on Linux, looks for work before its threads sleep. It would look for
# milliseconds. That is a little faster where it is alone, but where it is not it keeps others, and its own other
# threads, from running: beside two busy processes on two cores r50 took 2.2 times as long.
SPIN_COUNT = ("GOMP_SPINCOUNT", "2000")
# A machine is shared from this load for each of its cores on.
SHARED_LOAD = 0.5


def share_cores() -> None:
    """On a machine with other work let threads that wait sleep soon; to be called before torch is imported.

    What the environment says of it stands.
    """
    if "OMP_WAIT_POLICY" in os.environ or not hasattr(os, "getloadavg"):
        return
    if os.getloadavg()[0] >= SHARED_LOAD * (os.cpu_count() or 1):
        os.environ.setdefault(*SPIN_COUNT)


def use_available_cores() -> None:
    """Let torch compute with no more threads than there are cores for them; OMP_NUM_THREADS overrules."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    cores = available_cores()
    if torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def _quotas(groups: Path, membership: Path) -> Iterator[float]:
    """Every limit, in cores, on the control groups this process is in: cgroup v2 and v1."""
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        is_v2 = not controllers
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        root = groups if is_v2 else groups / "cpu"
        # Within a container the path is often that of the host, and the container's own group is the root.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            # Where there is no limit v2 says "max" and v1 says -1.
            with suppress(OSError, ValueError):
                if is_v2:
                    quota, period = (folder / "cpu.max").read_text().split()
                else:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                yield int(quota) / int(period)
            if folder == root:
                break
