"""Waiting that ends: a network disk that is gone blocks whoever reads from it for ever, and nothing wakes it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")

READ_TIMEOUT = 300  # s without progress; no picture that is accepted takes nearly as long, a way into a video may
_GRACE = 5  # s that are left when the run is to stop
_LOOK = 0.5  # s between two looks whether it is


def call_within(
    seconds: float,
    function: Callable[[], Result],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[], int] = lambda: 0,
) -> Result:
    """What ``function`` gives or raises; TimeoutError where that takes longer, or soon after ``should_stop`` says so.

    The time begins anew whenever ``progress`` has changed. 0 waits without end. It runs on a thread of its own, which
    after a TimeoutError is left to itself: the end of the process ends it too.
    """
    if not seconds:
        return function()
    outcome: list[tuple[Result, None] | tuple[None, BaseException]] = []

    def work() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    # Not of a pool: those are waited for at the end of the process.
    thread = threading.Thread(target=work, name="ddetr-read", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system gives no more threads (ulimit -u)
        return function()
    end, is_stopping, seen = time.monotonic() + seconds, False, progress()
    while thread.is_alive() and (left := end - time.monotonic()) > 0:
        thread.join(min(left, _LOOK))
        if not is_stopping and should_stop():
            is_stopping, end = True, min(end, time.monotonic() + _GRACE)
        if not is_stopping and (now := progress()) != seen:
            end, seen = time.monotonic() + seconds, now
    if not outcome:
        raise TimeoutError
    result, error = outcome.pop()
    if error is None:
        return result  # type: ignore[return-value]
    try:
        raise error
    finally:
        error = None  # its traceback holds this frame: a ring that would keep the picture's memory
