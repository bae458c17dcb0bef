"""What the processor has used so far, where the machine says: Intel's and AMD's running average power limit counters.

They count the whole package, whoever uses it. Virtual machines rarely show them, and newer kernels only to root.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Adds up the counters of all packages; ``is_available`` is False where none can be read."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package (also on AMD); intel-rapl:0:0 is a part of it.
        zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self._zones = [zone for zone in zones if _microjoules(zone / "energy_uj") is not None]
        self._ranges = [_microjoules(zone / "max_energy_range_uj") or 0 for zone in self._zones]
        self._last = self._read()

    @property
    def is_available(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._zones)

    def take(self) -> float:
        """Joules since the last time."""
        before, self._last = self._last, self._read()
        used = 0
        for old, new, largest in zip(before, self._last, self._ranges, strict=True):
            used += new - old if new >= old else new - old + largest  # the counter went round
        return used / 1e6

    def _read(self) -> list[int]:
        return [_microjoules(zone / "energy_uj") or 0 for zone in self._zones]


def _microjoules(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
