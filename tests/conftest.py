"""What tests may ask for: the shared data, the native kernels, a GPU. What is missing is skipped, and says so."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

    from ddetr_cli.weights import LoadedModel


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ddetr")
    group.addoption(
        "--require-native",
        action="store_true",
        help="fail, instead of skip, tests of the native CPU kernels where there are none (DDETR_REQUIRE_NATIVE too)",
    )
    group.addoption(
        "--require-cuda", action="store_true", help="fail, instead of skip, tests that need a CUDA device"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that at the end no process works at a long one alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of large test data, named by DDETR_TEST_DATA."""
    name = os.environ.get("DDETR_TEST_DATA")
    if not name:
        pytest.skip("DDETR_TEST_DATA does not name the folder of test data")
    path = Path(name)
    if not path.is_dir():
        pytest.fail(f"DDETR_TEST_DATA={name} is not a folder")
    return path


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    """Starts processes for commands in which all imports are done already.

    One for all tests, as Python has but one such server: whoever starts it chooses what it imports.
    """
    context = multiprocessing.get_context("forkserver")
    commands = [f"ddetr_cli.cli.{name}" for name in ("app", "bench", "detect", "eval", "export", "train")]
    late = ["ddetr_cli.data.images", "ddetr_cli.detect.run", "ddetr_cli.train.run", "pycocotools.cocoeval"]
    # What optimisers and curves import when they are first used takes longer than a test's training.
    theirs = ["torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "typer._adapters"]
    context.set_forkserver_preload([*commands, *late, *theirs])
    return context


@pytest.fixture
def require_native(request: pytest.FixtureRequest) -> None:
    """Skip, or fail where they are required, without native CPU kernels."""
    from ddetr_cli.ops import kernels, native

    if native.cpu_kernels() is None:
        reason = "no native CPU kernels are installed"
        if request.config.getoption("--require-native") or kernels.is_native_required():
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def require_cuda(request: pytest.FixtureRequest) -> None:
    """Skip, or fail where it is required, without a CUDA device and the CUDA kernels."""
    import torch

    from ddetr_cli.ops import native_cuda

    if torch.cuda.is_available() and native_cuda.cuda_kernels() is not None:
        return
    reason = "no CUDA kernels are installed" if torch.cuda.is_available() else "no CUDA device"
    if request.config.getoption("--require-cuda"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def emulated_cuda_library(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libddetr_cuda.so whose kernels run on the CPU, thread by thread (tests/native/emulated_cuda)."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulated_cuda")
    headers, source = repository / "tests/native/emulated_cuda", repository / "csrc"
    flags = ["-std=gnu++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden"]
    command = [compiler, *flags, f"-I{headers}", f"-I{source / 'include'}"]
    files = [*sorted(source.glob("*.cu")), source / "status.cpp", headers / "controls.cpp"]
    objects = [folder / f"{file.stem}.o" for file in files]
    jobs = [
        subprocess.Popen([*command, "-x", "c++", "-c", str(file), "-o", str(to)], stderr=subprocess.PIPE, text=True)
        for file, to in zip(files, objects, strict=True)
    ]
    for job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors
    library = folder / "libddetr_cuda.so"
    subprocess.run([compiler, "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A detector small enough to run in milliseconds, with random weights that never change."""
    import torch

    from ddetr_cli.classes import ClassTable
    from ddetr_cli.model.build import build_detector
    from ddetr_cli.presets import get_preset
    from ddetr_cli.weights import LoadedModel, LoadReport

    config = get_preset(
        "tiny",
        hidden_dim=64,
        heads=2,
        encoder_layers=1,
        decoder_layers=1,
        ffn_dim=32,
        queries=40,
        classes=3,
        image_size=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_detector(config).eval()
        # The untrained heads give every query nearly the same answer; these give each its own.
        for head in model.class_embed:
            torch.nn.init.normal_(head.get_parameter("weight"), std=0.5)
    classes = ClassTable((1, 2, 7), ("cat", "dog", None))
    report = LoadReport(Path("tiny.safetensors"), "ddetr", "tiny", len(model.state_dict()))
    return LoadedModel(model, config, classes, report, Path("tiny.safetensors"), "0" * 64)
