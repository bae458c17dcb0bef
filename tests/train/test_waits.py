"""For what a training step makes the host wait: on a GPU, and, watched op by op, on a device that only plays one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddetr_cli.errors import DivergedError
from ddetr_cli.model.backbone import BACKBONES
from ddetr_cli.model.build import build_detector
from ddetr_cli.model.detector import DetectionModel
from ddetr_cli.presets import get_preset
from ddetr_cli.train.criterion import Criterion
from ddetr_cli.train.dataset import Batch
from ddetr_cli.train.loop import MAX_BAD_STEPS, Trainer
from ddetr_cli.train.matcher import Target
from ddetr_cli.train.recipe import Recipe, parameter_groups

aten = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")
# What asks a device for numbers that the host goes on with, and what its answer is taken to be.
_ASKING: dict[Any, Callable[[Tensor], Any]] = {
    aten._local_scalar_dense.default: lambda x: 1.0 if x.dtype.is_floating_point else 1,
    aten.nonzero.default: lambda x: x.new_empty(0, x.dim(), dtype=torch.long),
    aten.masked_select.default: lambda x: x.new_empty(0),
    aten._unique2.default: lambda x: (x, x, x),
    aten.equal.default: lambda x: True,
    aten.repeat_interleave.Tensor: lambda x: x,
}


class _Ops(TorchDispatchMode):
    """Writes down, of ops on meta tensors, what a GPU would make the host wait for."""

    def __init__(self, waits: list[str], pinned: set[int]) -> None:
        super().__init__()
        self.waits, self.pinned = waits, pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None:
            return func(*args, **kwargs)
        if first.is_meta and func in _ASKING:
            self.waits.append(str(func))
            return _ASKING[func](first)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and first.is_meta:
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                self.waits.append("boolean index")
                return first
            self._note_upload(*(index for index in args[1] if index is not None), is_waiting=True)
        if func is aten._to_copy.default and "device" in kwargs:
            is_waiting = not kwargs.get("non_blocking")
            if first.is_meta and kwargs["device"] == CPU:
                if is_waiting:
                    self.waits.append("to host")
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            if not first.is_meta and kwargs["device"] == META:
                self._note_upload(first, is_waiting=is_waiting)
        if func is aten.copy_.default and first.is_meta:
            self._note_upload(args[1], is_waiting=not (args[2:] or (kwargs.get("non_blocking"),))[0])
        return func(*args, **kwargs)

    def _note_upload(self, *sources: Tensor, is_waiting: bool) -> None:
        for source in sources:
            if not source.is_meta and source.dim() and (is_waiting or source.data_ptr() not in self.pinned):
                self.waits.append("upload")


class _Factories(TorchFunctionMode):
    """Writes down tensors made of Python numbers on the device itself: a copy that is waited for."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_numbers = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if is_numbers and kwargs.get("device") not in (None, CPU, "cpu"):
            self.waits.append("tensor of numbers")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.waits.extend("tensor of numbers" for index in indices if isinstance(index, list))
        return func(*args, **kwargs)


@contextmanager
def _watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a GPU would make the host wait for in the block, as it happens."""
    waits: list[str] = []
    pinned: set[int] = set()

    def pin(tensor: Tensor) -> Tensor:
        pinned.add(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # not to be had for this device
    with _Factories(waits), _Ops(waits, pinned):
        yield waits


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x.sum().item(), "aten._local_scalar_dense.default"),
        (lambda x: bool((x > 0).any()), "aten._local_scalar_dense.default"),
        (lambda x: x.nonzero(), "aten.nonzero.default"),
        (lambda x: x[x > 0], "boolean index"),
        (lambda x: x.masked_select(x > 0), "aten.masked_select.default"),
        (lambda x: x.cpu(), "to host"),
        (lambda x: x.tolist(), "to host"),
        (lambda x: x[[1, 0]], "tensor of numbers"),
        (lambda x: torch.ones(3).to(x.device), "upload"),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True), "upload"),
        (lambda x: x.copy_(torch.ones(3)), "upload"),
        (lambda x: torch.tensor([1, 2], device=x.device), "tensor of numbers"),
    ],
)
def test_the_watch_sees_what_waits(
    wait: Callable[[Tensor], object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.empty(3, device=META)
    with _watched(monkeypatch) as waits:
        wait(x)
    assert waits[:1] == [name]


def _trainer(preset: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Trainer:
    tiny = replace(BACKBONES["resnet-tiny"], widths=(16, 16, 16, 16), depths=(1, 1, 1, 1), stem_channels=16)
    monkeypatch.setitem(BACKBONES, "resnet-tiny", tiny)
    torch.manual_seed(0)
    model: DetectionModel = build_detector(
        get_preset(
            preset, backbone="resnet-tiny", hidden_dim=64, heads=2, encoder_layers=1, decoder_layers=3, ffn_dim=32,
            queries=9, classes=3,
        )
    )  # fmt: skip
    values: dict[str, Any] = {"learning_rate": 1e-3, "backbone_rate": 1e-3, "ema_decay": 0.9, **changes}
    recipe = Recipe(epochs=9, batch_size=2, **values)
    trainer = Trainer(model, Criterion(model.config.family), recipe, parameter_groups(model, recipe), device)
    trainer.train_mode()
    return trainer


def _batch(*, is_padded: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(3)
    targets = [Target(torch.arange(n), torch.rand(n, 4, generator=generator) * 0.3 + 0.2) for n in (3, 1)]
    is_padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    is_padding[1, :, 64:] = True
    return Batch(torch.randn(2, 3, 64, 96, generator=generator), is_padding if is_padded else None, targets)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("preset", ["r50", "r50-refine", "r50-two-stage", "r50-single-scale-dc5", "detr-r50"])
def test_a_step_waits_for_its_device_once_a_pass(
    preset: str, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(preset, META, monkeypatch)
    # No kernels of meta tensors; on a GPU the fused one asks for nothing (below).
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    with _watched(monkeypatch) as waits:
        batch = _batch(is_padded=is_padded).pin_memory()
        trainer.step([batch, batch])
        assert waits == ["to host"] * 2
        trainer.step([batch])
        assert waits == ["to host"] * 3


@pytest.mark.usefixtures("require_cuda")
@pytest.mark.parametrize("preset", ["r50", "r50-two-stage", "detr-r50"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_a_step_waits_once_a_pass(preset: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(preset, torch.device("cuda"), monkeypatch, precision=precision)
    batch = _batch().pin_memory()
    for _ in range(2):  # libraries prepare themselves
        trainer.step([batch])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = trainer.step([batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    synchronizing = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    assert len(synchronizing) == 1, [f"{w.filename}:{w.lineno}" for w in synchronizing]
    assert math.isfinite(result.loss)


@pytest.mark.parametrize("bad", [(), (0,), (1, 2), (3,)])
def test_what_is_learnt_late_changes_no_number(bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for is_late in (False, True):
        trainer = _trainer("r50", CPU, monkeypatch)
        trainer.is_late = is_late  # as on a GPU, or not
        results = []
        for number in range(4):
            batch = _batch()
            if number in bad:
                batch.pixels[0, 0, 0, 0] = math.nan
            results.append(trainer.step([batch]))
        trainer.settle()
        assert trainer.average is not None
        states.append(
            {
                **{f"model {name}": tensor.clone() for name, tensor in trainer.model.state_dict().items()},
                **{f"average {name}": tensor for name, tensor in trainer.average.state.items()},
                "counts": torch.tensor([trainer.average.steps, trainer.bad_in_a_row, trainer.steps_done]),
                "losses": torch.tensor([result.loss for result in results]),
            }
        )
    at_once, late = states
    assert [n for n, tensor in at_once.items() if not torch.equal(tensor.nan_to_num(7), late[n].nan_to_num(7))] == []
    assert at_once["losses"].isnan().nonzero()[:, 0].tolist() == list(bad)


def test_a_run_that_diverges_ends_when_the_next_step_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer("r50", CPU, monkeypatch)
    trainer.is_late = True
    bad = _batch()
    bad.pixels.fill_(math.nan)
    for _ in range(MAX_BAD_STEPS):
        trainer.step([bad])
    assert trainer.bad_in_a_row == MAX_BAD_STEPS - 1
    with pytest.raises(DivergedError, match="not finite for 10 steps in a row"):
        trainer.step([_batch()])
    assert (trainer.bad_in_a_row, trainer.steps_done) == (MAX_BAD_STEPS, MAX_BAD_STEPS)
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.model.state_dict().values())


def test_a_run_that_diverges_with_its_last_step_ends_when_that_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer("r50", CPU, monkeypatch)
    trainer.is_late = True
    bad = _batch()
    bad.pixels.fill_(math.nan)
    for _ in range(MAX_BAD_STEPS):
        trainer.step([bad])
    with pytest.raises(DivergedError, match="not finite for 10 steps in a row"):
        trainer.settle()
    assert (trainer.bad_in_a_row, trainer.steps_done) == (MAX_BAD_STEPS, MAX_BAD_STEPS)
    assert trainer.is_between_steps
    trainer.settle()  # told once: what is left of the run can still be saved
