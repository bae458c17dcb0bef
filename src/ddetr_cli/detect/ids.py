"""The COCO image id of every input."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def assign_image_ids(names: Sequence[str]) -> list[int]:
    """One distinct id for each of ``names``, which stand in processing order.

    A stem of exactly 12 digits that no other input has is the id, as in COCO's own files. Every other input takes
    its 1-based position in the list, or the next number that is free.
    """
    stems = [PurePosixPath(name).stem for name in names]
    count = Counter(stems)
    numbers = [int(stem) if _is_coco_number(stem) and count[stem] == 1 else None for stem in stems]
    taken = {number for number in numbers if number is not None}
    ids: list[int] = []
    last = 0
    for position, number in enumerate(numbers, start=1):
        if number is None:
            # Ids given out by position rise, so "free" needs only the last of them and the numbers.
            last = max(position, last + 1)
            while last in taken:
                last += 1
            number = last
        ids.append(number)
    return ids


def _is_coco_number(stem: str) -> bool:
    return len(stem) == 12 and stem.isascii() and stem.isdigit()
