from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref

import pytest

from ddetr_cli.detect import patience
from ddetr_cli.detect.patience import call_within
from ddetr_cli.errors import ImageError


def test_what_comes_in_time_is_given_and_what_is_raised_is_raised() -> None:
    def fail() -> None:
        raise ImageError("a.jpg: no image.")

    assert call_within(60, lambda: 7) == 7
    assert call_within(60, lambda: None) is None
    with pytest.raises(ImageError, match="no image"):
        call_within(60, fail)


def test_what_does_not_come_in_time_is_left_to_itself() -> None:
    release, returned = threading.Event(), threading.Event()

    def hang() -> None:
        release.wait()
        returned.set()

    with pytest.raises(TimeoutError):
        call_within(0.05, hang)
    assert not returned.is_set()
    release.set()
    assert returned.wait(60)


def test_a_run_that_is_to_stop_does_not_wait_for_the_limit() -> None:
    release = threading.Event()
    with pytest.raises(TimeoutError):
        call_within(86_400, release.wait, should_stop=lambda: True)
    release.set()


def test_the_time_is_that_without_progress() -> None:
    steps: list[int] = []

    def work() -> int:
        for step in range(20):
            time.sleep(0.05)
            steps.append(step)
        return len(steps)

    assert call_within(0.5, work, progress=lambda: len(steps)) == 20
    release = threading.Event()
    with pytest.raises(TimeoutError):
        call_within(0.05, release.wait, progress=lambda: len(steps))
    release.set()


def test_progress_does_not_hold_up_a_run_that_is_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_GRACE", 0.2)
    release, looks = threading.Event(), itertools.count()
    with pytest.raises(TimeoutError):
        call_within(86_400, release.wait, should_stop=lambda: True, progress=lambda: next(looks))
    release.set()


def test_without_a_limit_it_runs_here() -> None:
    assert call_within(0, threading.current_thread) is threading.current_thread()
    assert call_within(60, threading.current_thread) is not threading.current_thread()


def test_where_no_thread_can_be_started_it_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert call_within(60, threading.current_thread) is threading.current_thread()


def test_a_failure_keeps_nothing_of_the_picture_in_memory() -> None:
    class Pixels:
        pass

    kept: list[weakref.ref[Pixels]] = []

    def fail() -> None:
        pixels = Pixels()
        kept.append(weakref.ref(pixels))
        raise ImageError("a.jpg: damaged.")

    gc.disable()
    try:
        with pytest.raises(ImageError):
            call_within(60, fail)
        assert kept[0]() is None
    finally:
        gc.enable()
