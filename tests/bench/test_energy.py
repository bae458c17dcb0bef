"""The processor's energy counters."""

from __future__ import annotations

from pathlib import Path

from ddetr_cli.bench.energy import EnergyMeter


def zone(powercap: Path, name: str, microjoules: int, largest: int = 1_000_000_000) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")
    return folder


def test_joules_of_all_packages_are_added_and_parts_of_them_are_not(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 5_000_000)
    zone(tmp_path, "intel-rapl:1", 7_000_000)
    zone(tmp_path, "intel-rapl:0:0", 1_000_000)
    meter = EnergyMeter(tmp_path)
    assert meter.is_available
    zone(tmp_path, "intel-rapl:0", 6_500_000)
    zone(tmp_path, "intel-rapl:1", 9_000_000)
    zone(tmp_path, "intel-rapl:0:0", 9_000_000)
    assert meter.take() == 3.5
    assert meter.take() == 0


def test_a_counter_that_went_round_is_followed(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 999_000_000)
    meter = EnergyMeter(tmp_path)
    zone(tmp_path, "intel-rapl:0", 2_000_000)
    assert meter.take() == 3


def test_a_machine_without_counters_says_so(tmp_path: Path) -> None:
    assert not EnergyMeter(tmp_path).is_available
    (tmp_path / "intel-rapl:0").mkdir()  # there, but not to be read
    assert not EnergyMeter(tmp_path).is_available
