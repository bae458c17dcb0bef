"""What a measurement says to a reader: tables of text, drawn by whoever shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ddetr_cli.bench.timing import Samples


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first ``labels`` columns are words, the others figures."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1
    notes: tuple[str, ...] = ()  # sentences below it

    def markdown(self) -> str:
        """The table for a README, its title above it and its notes below."""
        aligned = ["---" if number < self.labels else "---:" for number in range(len(self.headings))]
        lines = [_markdown_row(cells) for cells in (self.headings, aligned, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, "", *(f"- {note}" for note in self.notes)]) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


class Section(Protocol):
    """The result of one measurement."""

    @property
    def key(self) -> str:
        """Under which it stands in the JSON document."""

    def tables(self) -> list[Table]:
        """For a reader."""

    def to_json(self) -> Any:
        """Everything, as plain JSON types."""


class Listener(Protocol):
    """Whoever follows a measurement while it runs."""

    def expect(self, runs: int) -> None:
        """So many timed runs come next."""

    def ran(self) -> None:
        """One of them is done."""

    def notice(self, text: str) -> None:
        """A sentence for the user: a download, or what a model file or a peer could not do."""


class Silence:
    """A listener that does not listen."""

    def expect(self, runs: int) -> None: ...
    def ran(self) -> None: ...
    def notice(self, text: str) -> None: ...


def milliseconds(seconds: float) -> str:
    """Milliseconds in three digits or more."""
    value = seconds * 1e3
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def middle_half(times: Samples) -> str:
    """The quartiles of seconds, in milliseconds."""
    return "-".join(milliseconds(value) for value in times.quartiles)


def times_as(ratio: Samples) -> str:
    """A ratio with its quartiles: ``2.41x (2.38-2.44)``."""
    low, high = ratio.quartiles
    return f"{ratio.median:.2f}x ({low:.2f}-{high:.2f})"


def percent(share: Samples) -> str:
    """A share of one with its quartiles: ``72% (70-73)``."""
    low, high = share.quartiles
    return f"{share.median:.0%} ({100 * low:.0f}-{100 * high:.0f})"


def peer_notes(versions: Mapping[str, str | None], absent: Mapping[str, str]) -> tuple[str, ...]:
    """With which ``versions`` of others' programs was measured, and why those in ``absent`` were not."""
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    missing = "; ".join(f"{name} ({why})" for name, why in absent.items())
    return (*([f"with {installed}"] if installed else []), *([f"not measured: {missing}"] if missing else []))
