"""Reading files that break off, on one thread while others refuse them."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import ImageFile

if TYPE_CHECKING:
    from collections.abc import Iterator


class _PerThread(threading.local):
    """True or false, for each thread its own."""

    is_allowed = False

    def __bool__(self) -> bool:
        return self.is_allowed


_switch = _PerThread()


@contextmanager
def truncated_allowed() -> Iterator[None]:
    """Within the block this thread's Pillow fills up what is missing at the end of a file instead of refusing it."""
    # Pillow asks one module-wide variable for its truth. A plain True would let damaged files of other threads pass
    # as whole ones.
    image_file: Any = ImageFile
    image_file.LOAD_TRUNCATED_IMAGES = _switch
    _switch.is_allowed = True
    try:
        yield
    finally:
        _switch.is_allowed = False
