"""Who a process is among those of one run."""

from __future__ import annotations

import pytest
import torch

from ddetr_cli.distributed import device_name, world
from ddetr_cli.errors import UsageError


def test_the_environment_says_who_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert world() == (0, 1, 0) and device_name("cuda:3") == "cuda:3"
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert world() == (5, 8, 1) and device_name("cpu") == "cpu"
    with pytest.raises(UsageError, match="not with several processes"):
        device_name("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus, expected in ((4, "cuda:1"), (1, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert device_name("auto") == expected
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(UsageError, match="RANK=8, WORLD_SIZE=8"):
        world()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="RANK=first: not a number"):
        world()
