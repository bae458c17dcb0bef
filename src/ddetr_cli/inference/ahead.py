"""Work beside the model, on threads: pictures read and prepared ahead of it, results drawn behind it.

Pillow lets go of the interpreter while it decodes, resizes and encodes, so threads are enough. Importing this module
does not import torch.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from ddetr_cli.inference.threads import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Executor

Item = TypeVar("Item")
Result = TypeVar("Result")

# Two keep a model on the CPU supplied even with photographs of 12 megapixels, and more would only take its cores. A
# GPU waits for the cores, so it gets all of them, up to what one disk can feed.
_BESIDE_CPU = 2
_BESIDE_GPU = 16


def helper_threads(device_type: str) -> int:
    """How many threads should work beside a model on this type of device."""
    return _BESIDE_CPU if device_type == "cpu" else max(_BESIDE_CPU, min(_BESIDE_GPU, available_cores()))


class HelperPool(ThreadPoolExecutor):
    """Threads, or where the system gives no more of them (``ulimit -u``) the calling one, at once and in turn."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As ThreadPoolExecutor's."""
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def map_ahead(
    pool: Executor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
    *,
    weight: Callable[[Result], int] = lambda _: 0,
    limit: int = 1,
) -> Iterator[Result]:
    """``function`` of each item, computed in ``pool``, in the order of ``items``.

    At most ``ahead`` (1 or more) results are finished or in work beyond the one given, and no more are begun while
    the finished ones weigh ``limit`` or more. ``items`` is read by the caller's thread. What ``function`` raises is
    raised here, in the place of its result.
    """
    work = iter(items)
    waiting: deque[Future[Result]] = deque()

    def finished_weight() -> int:
        return sum(weight(f.result()) for f in waiting if f.done() and f.exception() is None)

    def begin_more() -> None:
        while len(waiting) < ahead and finished_weight() < limit:
            begun = len(waiting)
            waiting.extend(pool.submit(function, item) for item in islice(work, 1))
            if len(waiting) == begun:
                return

    try:
        begin_more()
        while waiting:
            result = waiting.popleft().result()
            begin_more()
            yield result
    finally:
        for future in waiting:
            future.cancel()
