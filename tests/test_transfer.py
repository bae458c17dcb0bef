from __future__ import annotations

import pytest
import torch

from ddetr_cli.transfer import Download, upload

CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3.0)
    assert upload(tensor, CPU) is tensor
    download = Download(tensor)
    assert download.is_there and download.wait() is tensor


def test_what_goes_to_another_device_goes_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: pinned)
    copies: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        pinned, "to", lambda device, non_blocking: copies.append((device, non_blocking)), raising=False
    )
    upload(torch.zeros(3), torch.device("meta"))
    assert copies == [(torch.device("meta"), True)]


@pytest.mark.usefixtures("require_cuda")
def test_on_a_gpu_neither_way_waits_for_the_work_before() -> None:
    device = torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = upload(torch.arange(4.0), device)
        download = Download(there + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert download.wait().tolist() == [1.0, 2.0, 3.0, 4.0]
    assert download.is_there
