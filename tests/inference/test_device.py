from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ddetr_cli.errors import DeviceError, UsageError
from ddetr_cli.inference.device import check_device_name, resolve_device


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_the_four_ways_to_name_a_device_are_taken(text: str) -> None:
    assert check_device_name(text) == text


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "cuda:0 ", "cuda:0\n", "mps"])
def test_any_other_name_is_a_usage_error_that_lists_them(text: str) -> None:
    with pytest.raises(UsageError, match="Choose auto, cpu, cuda or cuda:N"):
        check_device_name(text)


def test_checking_a_name_does_not_import_torch() -> None:
    program = (
        "import sys; from ddetr_cli.inference.device import check_device_name as check; "
        "check('cpu'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_cuda_without_a_gpu_is_a_device_error_that_offers_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"device cuda:0: not available \(.*\)\. Use --device cpu"):
        resolve_device("cuda")


def test_auto_without_a_gpu_is_the_cpu_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    notices: list[str] = []
    assert resolve_device("auto", on_notice=notices.append) == torch.device("cpu")
    assert notices == []


def test_an_index_past_the_last_gpu_names_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"cuda:5: not available \(this machine has 2: cuda:0 to cuda:1\)"):
        resolve_device("cuda:5")


def test_a_gpu_this_pytorch_has_no_kernels_for_is_refused_by_name_and_auto_goes_on_with_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (5, 2))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(DeviceError, match="no kernel image for sm_52 in this PyTorch, which has sm_75 sm_90"):
        resolve_device("cuda:0")
    notices: list[str] = []
    assert resolve_device("auto", on_notice=notices.append) == torch.device("cpu")
    assert len(notices) == 1
    assert notices[0].endswith("Going on with the CPU.")
