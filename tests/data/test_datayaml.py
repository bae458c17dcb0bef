from __future__ import annotations

from pathlib import Path

import pytest

from ddetr_cli.data.datayaml import read_data_yaml
from ddetr_cli.errors import DatasetError


def write(root: Path, text: str) -> Path:
    (root / "data.yaml").write_text(text)
    return root / "data.yaml"


def test_names_may_be_a_list_or_a_numbered_table(tmp_path: Path) -> None:
    assert read_data_yaml(write(tmp_path, "train: a\nnames: [cat, 7]")).names == {0: "cat", 1: "7"}
    assert read_data_yaml(write(tmp_path, "train: a\nnames: {0: cat, 4: dog}")).names == {0: "cat", 4: "dog"}


def test_folders_follow_path_and_fall_back_to_beside_the_file(tmp_path: Path) -> None:
    for folder in ("set/images/train", "valid/images", "test/images"):
        (tmp_path / folder).mkdir(parents=True)
    text = "path: set\ntrain: images/train\nval: ../valid/images\ntest: test/images\nnames: [a]"
    found = {name: path.resolve() for name, path in read_data_yaml(write(tmp_path, text)).splits.items()}
    assert found == {
        "train": tmp_path / "set/images/train",
        "val": tmp_path / "valid/images",
        "test": tmp_path / "test/images",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("names: [a\n", "line 2, column 1: not YAML"),
        ("- a\n- b", "top level is a list"),
        ("train: a", "'names' is not a list"),
        ("train: a\nnames: []", "'names' is not a list"),
        ("train: a\nnames: {cat: 0}", "'names' is not a list"),
        ("names: [a]", "names no pictures"),
        ("names: [a]\ntrain: [a, b]", "not one folder"),
        ("names: [a]\ntrain: a\nkpt_shape: [17, 3]", "key points"),
        ("names: !!python/object/apply:os.system [touch canary]\ntrain: a", "not YAML"),
        ("names: [a]\ntrain: " + "[" * 5000, "not YAML"),
    ],
)
def test_what_is_no_data_yaml_is_refused(
    tmp_path: Path, text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=expected):
        read_data_yaml(write(tmp_path, text))
    assert not (tmp_path / "canary").exists()


def test_anchors_that_multiply_take_no_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    with pytest.raises(DatasetError, match="'names'"):
        read_data_yaml(write(tmp_path, "\n".join([*lines, "train: a", "names: *a29"])))
