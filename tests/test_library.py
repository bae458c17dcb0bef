"""What a program gets from ``ddetr_cli``: numbers and pictures of the command line, typed, torch only on demand."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import ddetr_cli
from ddetr_cli import Detector, draw
from ddetr_cli.cli.app import main


@pytest.fixture(scope="module")
def pictures(repository: Path) -> list[Path]:
    return sorted((repository / "examples" / "images").glob("*.jpg"))[:3]


@pytest.mark.parametrize("preprocess", ["original", "hf"])
def test_a_program_gets_the_numbers_and_pictures_of_the_command_line(
    pictures: list[Path], tmp_path: Path, preprocess: str
) -> None:
    options = ["--model", "demo", "--device", "cpu", "--threshold", "0.3", "--image-size", "128", "-q"]
    command = ["detect", *map(str, pictures), "--output", str(tmp_path / "out"), "--preprocess", preprocess]
    assert main([*command, *options]) == 0
    written = json.loads((tmp_path / "out/detections.json").read_text())
    images = json.loads((tmp_path / "out/images.json").read_text())
    assert images["info"]["preprocess"] == preprocess

    detector = Detector("demo", device="cpu", threshold=0.3, image_size=128, preprocess=preprocess)  # type: ignore[arg-type]
    results = list(detector.detect_many(pictures))
    assert [row for number, found in enumerate(results, 1) for row in found.to_coco(number)] == written
    assert len(written) > 0
    assert detector.categories == images["categories"]
    for path, found, image in zip(pictures, results, images["images"], strict=True):
        assert (found.width, found.height) == (image["width"], image["height"])
        drawn = io.BytesIO()
        draw(path, found).save(drawn, "JPEG", quality=92, subsampling=0)
        assert drawn.getvalue() == (tmp_path / "out/annotated" / path.name).read_bytes()


def test_a_picture_is_drawn_on_a_copy(pictures: list[Path]) -> None:
    picture = Image.open(pictures[0]).convert("RGB")
    before = picture.tobytes()
    found = Detector("demo", device="cpu", threshold=0.3, image_size=128).detect(picture)
    assert draw(picture, found).tobytes() != before
    assert picture.tobytes() == before
    assert draw(picture, []).tobytes() == before


def test_importing_the_package_imports_neither_torch_nor_pillow() -> None:
    program = (
        "import sys, ddetr_cli; names = dir(ddetr_cli)\n"
        "assert not {'torch', 'PIL', 'numpy', 'typer', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_using_the_detector_imports_nothing_of_the_command_line() -> None:
    program = (
        "import sys; from ddetr_cli import Detector, draw\n"
        "print({'typer', 'rich', 'torchvision', 'scipy', 'transformers', 'ddetr_cli.cli'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_every_public_name_is_there_and_documented_and_no_other() -> None:
    for name in ddetr_cli.__all__:
        assert getattr(ddetr_cli, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Detect'"):
        ddetr_cli.Detect  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(ddetr_cli.__file__).parent / "py.typed").is_file()


def test_a_type_checker_sees_the_types_of_the_results(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "program.py").write_text(
        "from ddetr_cli import Detector\n"
        "for one in Detector('demo').detect('a.jpg'):\n"
        "    reveal_type(one.box.x1)\n"
        "    reveal_type(one.label)\n"
        "Detector('demo', preprocess='theirs')\n"
    )
    # What ours imports has no part in these types, and takes most of the time.
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,numpy.*,PIL.*]\nfollow_imports = skip\n")
    package = Path(ddetr_cli.__file__).parents[1]
    # An installed package is found by itself; mypy refuses to be pointed at site-packages.
    path = {} if package.name == "site-packages" else {"MYPYPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(tmp_path), "program.py"],
        cwd=tmp_path,
        env={**path, "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert 'Revealed type is "float"' in done.stdout.replace("builtins.", "")
    assert 'Revealed type is "str"' in done.stdout.replace("builtins.", "")
    assert 'Argument "preprocess" to "Detector" has incompatible type' in done.stdout
