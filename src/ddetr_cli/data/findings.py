"""What is odd or wrong with a data set, kind by kind: how often, which first, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ddetr_cli.errors import DatasetError

# refused: nothing starts (exit 6). dropped, repaired: in memory, the files stay as they are. background: a picture
# with nothing to find in it. noted: left as it is.
Outcome = Literal["refused", "dropped", "repaired", "background", "noted"]

EXAMPLES = 5
_LONGEST = 120  # characters of an example in a sentence: a class name may have ten thousand


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of fault: ``count`` of ``total`` things of the kind ``unit`` ("annotations", "images") have it.

    ``count`` is 0 where it is about a file as a whole. ``examples`` are the first few; ``remedy`` says what to do.
    """

    outcome: Outcome
    what: str
    count: int = 0
    total: int = 0
    unit: str = ""
    examples: tuple[str, ...] = ()
    remedy: str = ""

    @property
    def amount(self) -> str:
        """``3 of 340 annotations``; empty for a file as a whole."""
        return f"{self.count} of {self.total} {self.unit}" if self.count else ""

    def sentence(self) -> str:
        """The finding as a message says it, without the file's name."""
        amount = f"{self.amount}{' dropped' if self.outcome == 'dropped' else ''}: " if self.count else ""
        return f"{amount}{self.what}{self._list()}. {self.remedy}".strip()

    def _list(self) -> str:
        if not self.examples:
            return ""
        examples = [e if len(e) <= _LONGEST else e[: _LONGEST - 3] + "..." for e in self.examples]
        return f" ({', '.join(examples)}{', ...' if self.count > len(examples) else ''})"


class Tally:
    """Counts findings over one list of things, keeping the first few of each kind."""

    def __init__(self, unit: str, total: int) -> None:
        self.unit, self.total = unit, total
        self._found: dict[tuple[Outcome, str, str], tuple[list[str], list[int]]] = {}

    def add(self, outcome: Outcome, what: str, example: str = "", *, count: int = 1, remedy: str = "") -> None:
        """Count one more (or ``count`` more) of a kind."""
        examples, counts = self._found.setdefault((outcome, what, remedy), ([], [0]))
        counts[0] += count
        if example and len(examples) < EXAMPLES:
            examples.append(example)

    def findings(self) -> tuple[Finding, ...]:
        """One finding for each kind, in the order they were met."""
        return tuple(
            Finding(outcome, what, counts[0], self.total, self.unit, tuple(examples), remedy)
            for (outcome, what, remedy), (examples, counts) in self._found.items()
        )


def refuse_if_needed(where: object, findings: Iterable[Finding]) -> None:
    """Raise DatasetError with the first refused finding, and how many more there are."""
    refused = [finding for finding in findings if finding.outcome == "refused"]
    if refused:
        more = f" ddetr train --check names {len(refused) - 1} more." if len(refused) > 1 else ""
        raise DatasetError(f"{where}: {refused[0].sentence()}{more}")


def told(where: object, findings: Iterable[Finding]) -> list[str]:
    """The sentences a user is to read before the work begins."""
    return [f"{where}: {f.sentence()}" for f in findings if f.outcome in ("dropped", "repaired", "noted")]


def repeated(values: Iterable[object]) -> list[str]:
    """The values that occur more than once, as text, in the order they came."""
    seen: set[object] = set()
    again: dict[object, None] = {}
    for value in values:
        if value in seen:
            again[value] = None
        seen.add(value)
    return [repr(value) for value in again]
