"""The stopwatch of nested parts, and the parts of every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddetr_cli.bench.clock import REST, PartClock, model_parts
from ddetr_cli.inference.fast import accelerate
from ddetr_cli.model.build import build_detector
from ddetr_cli.presets import get_preset


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def clock(time: Time) -> PartClock:
    return PartClock(torch.device("cpu"), clock=time)


def test_every_moment_belongs_to_the_innermost_part(clock: PartClock, time: Time) -> None:
    with clock.part("outer"):
        time.now += 1
        with clock.part("inner"):
            time.now += 10
        time.now += 2
    assert clock.take() == {"outer": 3.0, "inner": 10.0}


def test_time_outside_all_parts_is_nobodys(clock: PartClock, time: Time) -> None:
    time.now += 5
    with clock.part("a"):
        time.now += 1
    time.now += 5
    with clock.part("a"):
        time.now += 2
    assert clock.take() == {"a": 3.0}
    assert clock.take() == {}


def test_modules_are_watched_only_inside(clock: PartClock, time: Time) -> None:
    class Slow(nn.Module):
        def forward(self, x: int) -> int:
            time.now += x
            return x

    slow = Slow()
    with clock.watching({"slow": [slow]}):
        slow(4)
    slow(100)
    assert clock.take() == {"slow": 4.0}
    assert not slow._forward_hooks and not slow._forward_pre_hooks


@pytest.mark.usefixtures("require_native")
def test_steps_of_the_fast_path_are_parts_and_are_watched_only_inside() -> None:
    model = build_detector(get_preset("tiny", encoder_layers=1, decoder_layers=1, queries=10)).eval()
    fast = accelerate(model)
    assert fast is not None
    pixels = torch.zeros(1, 3, 64, 64)
    fast(pixels)
    ticks = iter(range(1_000_000))
    # A clock that ticks whenever it is read: every part that runs has time.
    clock = PartClock(torch.device("cpu"), clock=lambda: float(next(ticks)))
    parts = model_parts(model)
    with clock.watching(parts, fast), clock.part(REST):
        fast(pixels)
    seconds = clock.take()
    assert seconds.keys() == {*parts, REST}
    assert sum(seconds.values()) == next(ticks) - 1
    fast(pixels)
    assert clock.take() == {}


@pytest.mark.parametrize("preset", ["tiny", "detr-r50", "fasterrcnn-r50-fpn"])
def test_the_parts_of_a_model_hold_every_parameter_that_costs_time(preset: str) -> None:
    with torch.device("meta"):
        model = build_detector(get_preset(preset))
    in_parts = {id(p) for modules in model_parts(model).values() for module in modules for p in module.parameters()}
    outside = {name for name, p in model.named_parameters() if id(p) not in in_parts and p.dim() > 1}
    # Embeddings and the first stage between encoder and decoder are the rest.
    assert all("embed" in name or name.startswith(("transformer.enc_", "transformer.pos_")) for name in outside)
