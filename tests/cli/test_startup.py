"""What a command imports before it answers: importing torch is most of a short run, so everything else counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# What nothing of ours needs to find objects in a file with a model that is here. torch._dynamo and sympy come with
# arithmetic on meta tensors, and double the time of importing torch.
_NOT_TO_DETECT = (
    "torchvision",
    "transformers",
    "scipy",
    "pycocotools",
    "huggingface_hub",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "torch.distributed.tensor",
)


def imported_by(arguments: list[str], *, absent: tuple[str, ...] = ()) -> tuple[int, set[str]]:
    """The exit code of ``ddetr`` with ``arguments``, and the modules imported then; ``absent`` cannot be."""
    program = (
        "import sys\n"
        f"for name in {absent!r}: sys.modules[name] = None\n"
        "from ddetr_cli.cli.app import main\n"
        f"code = main({arguments!r})\n"
        "print()\n"
        "print(code, *(name for name, module in sys.modules.items() if module is not None))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, *modules = done.stdout.splitlines()[-1].split(" ")
    return int(code), set(modules)


@pytest.mark.parametrize("formats", ["coco", "coco,images"])
def test_detect_of_a_file_with_a_local_model_imports_torch_and_little_else(
    repository: Path, tmp_path: Path, formats: str
) -> None:
    picture = min((repository / "examples" / "images").glob("*.jpg"))
    arguments = ["detect", str(picture), "--model", "demo", "--device", "cpu", "--image-size", "64"]
    code, modules = imported_by([*arguments, "--format", formats, "--output", str(tmp_path / "out")])
    assert code == 0
    assert "torch" in modules
    assert modules & set(_NOT_TO_DETECT) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["detect", "--help"], ["detct"], ["eval", "--no"]])
def test_help_versions_and_wrong_usage_import_nothing_to_draw_or_compute_with(arguments: list[str]) -> None:
    _, modules = imported_by(arguments)
    assert modules & {"torch", "numpy", "PIL", "rich", "tqdm", "huggingface_hub"} == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["detect", "no-such-file.jpg"],
        ["detect", "pictures", "--device", "gpu"],
        ["detect", "pictures", "--threshold", "2"],
        ["detect", "pictures", "--preset", "r51"],
        ["detect", "pictures", "--nms", "70"],
        ["detect", "pictures", "--preprocess", "theirs"],
        ["detect", "pictures", "--resume", "--overwrite"],
        ["detect", "pictures", "--format", "xml"],
        ["eval"],
        ["eval", "--predictions", "no-such-file.json"],
        ["eval", "data", "--device", "gpu"],
        ["train"],
        ["bench", "--precision", "int3"],
    ],
)
def test_an_argument_that_means_nothing_is_refused_without_torch(arguments: list[str]) -> None:
    code, _ = imported_by(arguments, absent=("torch",))
    assert code == 2
