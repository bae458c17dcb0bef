from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from ddetr_cli.inference.ahead import helper_threads, map_ahead

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_results_come_in_the_order_of_the_items_however_long_each_takes(pool: ThreadPoolExecutor) -> None:
    others_are_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            others_are_done.wait(60)
        if item == 2:
            others_are_done.set()
        return item * item

    assert list(map_ahead(pool, work, range(5), ahead=3)) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_so_many_are_begun_beyond_the_one_given(pool: ThreadPoolExecutor, ahead: int) -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10):
            begun.append(item)
            yield item

    results = map_ahead(pool, lambda item: item, items(), ahead)
    assert [len(begun) - result - 1 for result in results] == [min(ahead, 9 - item) for item in range(10)]


def test_no_more_are_begun_while_the_finished_ones_weigh_too_much() -> None:
    begun: list[int] = []

    class AtOnce(ThreadPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
            future = super().submit(fn, *args, **kwargs)
            future.exception()  # waits, so that what is finished does not depend on the scheduler
            return future

    def note(item: int) -> int:
        begun.append(item)
        return item

    with AtOnce(1) as pool:
        results = map_ahead(pool, note, range(10), 8, weight=lambda _: 10, limit=30)
        assert [len(begun) - result for result in results] == [4, 4, 4, 4, 4, 4, 4, 3, 2, 1]


def test_an_error_comes_in_the_place_of_its_result_and_ends_the_rest(pool: ThreadPoolExecutor) -> None:
    results = map_ahead(pool, lambda item: 1 // item, [1, 1, 0, 1], ahead=4)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


def test_nothing_gives_nothing(pool: ThreadPoolExecutor) -> None:
    assert list(map_ahead(pool, str, [], ahead=2)) == []


def test_a_cpu_model_keeps_its_cores_and_a_gpu_gets_all_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 2), (8, 8), (96, 16)):
        monkeypatch.setattr("ddetr_cli.inference.ahead.available_cores", lambda cores=cores: cores)
        assert (helper_threads("cpu"), helper_threads("cuda")) == (2, expected)
