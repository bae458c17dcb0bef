"""Faults of annotation files and their pictures, each provoked alone and all at once: what train and eval do.

Every case runs on a made data set and, where DDETR_TEST_DATA names the folder of data, on a copy of coco_train40.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.cli.app import main

NAN, INFINITY = float("nan"), float("inf")
Document = dict[str, Any]
Spoil = Callable[[Document, Path], "bytes | None"]
REFUSED, DONE = 6, 0


@dataclass(frozen=True)
class Case:
    """``spoil`` changes the document, or the pictures in the folder it is given, or returns the file's new bytes.

    ``says`` is what --check prints, ``trains`` and ``scores`` the exit codes of train and eval.
    """

    spoil: Spoil
    says: str
    trains: int = DONE
    scores: int = DONE


def raw(change: Callable[[str], bytes]) -> Spoil:
    return lambda document, _: change(json.dumps(document))


def each(key: str, change: Callable[[Document, int], Any], count: int | None = None) -> Spoil:
    """Change the first ``count`` entries of a list, or all."""

    def spoil(document: Document, _: Path) -> None:
        for index, entry in enumerate(document[key][:count]):
            change(entry, index)

    return spoil


def one(key: str, **values: Any) -> Spoil:
    return each(key, lambda entry, _: entry.update(values), 1)


def without(key: str, field: str, count: int | None = 1) -> Spoil:
    return each(key, lambda entry, _: entry.pop(field), count)


def lacking(key: str) -> Spoil:
    def spoil(document: Document, _: Path) -> None:
        del document[key]

    return spoil


def boxes_as_corners(entry: Document, _: int) -> None:
    x, y, w, h = entry["bbox"]
    entry["bbox"] = [x, y, x + w, y + h]


def turned(document: Document, images: Path) -> None:
    """The first picture stored on its side, with an orientation that turns it as it was annotated."""
    path = images / document["images"][0]["file_name"]
    exif = Image.Exif()
    exif[274] = 6
    picture = Image.open(path).convert("RGB").transpose(Image.Transpose.ROTATE_90)
    path.unlink()
    picture.save(path, exif=exif)


def lose(document: Document, images: Path) -> None:
    (images / document["images"][0]["file_name"]).unlink()


def damage(document: Document, images: Path, *, keep: int = 0) -> None:
    path = images / document["images"][-1]["file_name"]
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:keep] if keep else b"not a picture")


def crowd_only(document: Document, _: Path) -> None:
    last = document["annotations"][-1]["image_id"]
    for entry in document["annotations"]:
        if entry["image_id"] == last:
            entry["iscrowd"] = 1


def background(document: Document, _: Path) -> None:
    last = document["annotations"][-1]["image_id"]
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] != last]


def many_objects(document: Document, _: Path) -> None:
    """5000 objects in the first picture that has one."""
    first = document["annotations"][0]
    document["annotations"] += [{**first, "id": 10_000_000 + n} for n in range(4999)]


def duplicate(key: str, field: str) -> Spoil:
    def spoil(document: Document, _: Path) -> None:
        document[key].append({**copy.deepcopy(document[key][-1]), field: document[key][0][field]})
        if field != "id":
            document[key][-1]["id"] = 987_654_321

    return spoil


def rename_ids(make: Callable[[int], int | str]) -> Spoil:
    def spoil(document: Document, _: Path) -> None:
        for image in document["images"]:
            image["id"] = make(image["id"])
        for annotation in document["annotations"]:
            annotation["image_id"] = make(annotation["image_id"])

    return spoil


def categories_from_0(document: Document, _: Path) -> None:
    """Ids 0 to n-1 with a gap up to one far above 90, and so many names that nobody has."""
    new = {category["id"]: index for index, category in enumerate(document["categories"])}
    new[document["categories"][-1]["id"]] = 5000
    for category in document["categories"]:
        category["id"] = new[category["id"]]
    for annotation in document["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    document["categories"] += [{"id": 1000 + n, "name": f"rare {n}"} for n in range(1000)]


def same_names(document: Document, _: Path) -> None:
    document["categories"] += [{"id": 900 + n, "name": "a,\n\x1b[31m😀" + "x" * 10_000} for n in range(2)]


CASES: dict[str, Case] = {
    # B1 to B3: the file
    "empty": Case(raw(lambda _: b""), "line 1, column 1: not JSON (the file is empty)", REFUSED, REFUSED),
    "half": Case(raw(lambda s: s[: len(s) // 2].encode()), "not JSON", REFUSED, REFUSED),
    "brackets": Case(raw(lambda _: b"[" * 100_000), "nested too deeply", REFUSED, REFUSED),
    "BOM": Case(raw(lambda s: b"\xef\xbb\xbf" + s.encode()), "can be trained on"),
    "UTF-16": Case(raw(lambda s: s.encode("utf-16")), "encoded as UTF-16", REFUSED, REFUSED),
    "Latin-1": Case(raw(lambda s: s.encode().replace(b"name", b"n\xe9me", 1)), "is not UTF-8", REFUSED, REFUSED),
    "list": Case(raw(lambda s: b"[" + s.encode() + b"]"), "top level is a list", REFUSED, REFUSED),
    "null": Case(lambda d, _: d.update(annotations=None), "'annotations' is null", REFUSED, REFUSED),
    "no images": Case(lacking("images"), "no key 'images'", REFUSED, REFUSED),
    "no categories": Case(lacking("categories"), "no key 'categories'", REFUSED, REFUSED),
    "no info": Case(lacking("info"), "can be trained on"),
    # B4, B5, B6, B7: ids
    "ids from 0": Case(each("annotations", lambda a, i: a.update(id=i)), "ids 0"),
    "ids equal": Case(each("annotations", lambda a, _: a.update(id=7)), "ids repeated, renumbered from 1"),
    "ids missing": Case(without("annotations", "id", None), "ids missing, renumbered from 1"),
    "image id twice": Case(duplicate("images", "id"), "image id occurs repeatedly", REFUSED, REFUSED),
    "file name twice": Case(duplicate("images", "file_name"), "file_name occurs repeatedly", REFUSED, REFUSED),
    "category id twice": Case(duplicate("categories", "id"), "category id occurs repeatedly", REFUSED, REFUSED),
    "of no image": Case(one("annotations", image_id=-5), "of an image that is not listed", REFUSED, DONE),
    "of no category": Case(one("annotations", category_id=-5), "of a category that is not listed", REFUSED, DONE),
    "string ids": Case(rename_ids(str), "can be trained on"),
    "huge ids": Case(rename_ids(lambda i: i + 2**60), "can be trained on"),
    "mixed ids": Case(rename_ids(lambda i: str(i) if i % 2 else i), "can be trained on"),
    # B8 to B14: boxes
    "no area": Case(without("annotations", "area", None), "area missing, filled with w*h"),
    "no iscrowd": Case(without("annotations", "iscrowd", None), "iscrowd missing, filled with 0"),
    "iscrowd text": Case(each("annotations", lambda a, _: a.update(iscrowd="0")), "iscrowd written as a string"),
    "iscrowd true": Case(one("annotations", iscrowd=True), "iscrowd written as true, false"),
    "iscrowd yes": Case(one("annotations", iscrowd="yes"), "iscrowd is neither 0 nor 1", REFUSED, REFUSED),
    "bbox of 3": Case(one("annotations", bbox=[1, 2, 3]), "bbox is not four finite numbers", REFUSED, REFUSED),
    "bbox of 5": Case(one("annotations", bbox=[1, 2, 3, 4, 5]), "bbox is not four finite", REFUSED, REFUSED),
    "bbox null": Case(one("annotations", bbox=None), "bbox is not four finite numbers", REFUSED, REFUSED),
    "bbox text": Case(one("annotations", bbox=["1", "2", "3", "4"]), "bbox is not four finite", REFUSED, REFUSED),
    "bbox []": Case(one("annotations", bbox=[]), "bbox is not four finite numbers", REFUSED, REFUSED),
    "no bbox": Case(without("annotations", "bbox"), "no 'bbox'", REFUSED, REFUSED),
    "bbox NaN": Case(one("annotations", bbox=[NAN, 1, 2, 3]), "[nan, 1, 2, 3]", REFUSED, REFUSED),
    "bbox infinite": Case(one("annotations", bbox=[0, 0, INFINITY, 3]), "[0, 0, inf, 3]", REFUSED, REFUSED),
    "zero size": Case(one("annotations", bbox=[5, 5, 0, 3]), "bbox without width or height"),
    "negative size": Case(one("annotations", bbox=[50, 40, -9, -9]), "bbox without width or height"),
    "sub-pixel": Case(one("annotations", bbox=[5, 5, 0.5, 9]), "bbox under one pixel wide or high"),
    "partly outside": Case(one("annotations", bbox=[-8, 5, 20, 20]), "bbox partly outside its image, clipped"),
    "outside": Case(one("annotations", bbox=[9000, 9000, 50, 50]), "bbox outside its image"),
    "xyxy": Case(each("annotations", boxes_as_corners), "looks like xyxy", REFUSED, REFUSED),
    # B15 to B18: pictures
    "other size": Case(
        each("images", lambda i, _: i.update(width=i["height"], height=i["width"]), 1), "is of another size", REFUSED,
        REFUSED,
    ),
    "turned": Case(turned, "fits its annotations only when turned upright"),
    "missing": Case(lose, "picture file is missing", REFUSED, REFUSED),
    "unreadable": Case(damage, "picture file cannot be read", REFUSED, REFUSED),
    "cut off": Case(lambda d, p: damage(d, p, keep=700), "picture file cannot be read", REFUSED, REFUSED),
    "path up": Case(one("images", file_name="../../etc/passwd"), "leads outside the image folder", REFUSED, REFUSED),
    "path absolute": Case(one("images", file_name="/etc/passwd"), "leads outside the image folder", REFUSED, REFUSED),
    "no annotations": Case(lambda d, _: d["annotations"].clear(), "no usable annotation among 0", REFUSED, REFUSED),
    "background": Case(background, "images: without annotations"),
    "crowd only": Case(crowd_only, "images: with crowd regions only"),
    "all crowds": Case(each("annotations", lambda a, _: a.update(iscrowd=1)), "nothing but crowd regions", REFUSED),
    # B19 to B21: classes and crowds
    "1000 classes": Case(categories_from_0, "have no object to learn them from"),
    "names": Case(same_names, "name belongs to several categories"),
    "5000 objects": Case(many_objects, "have more objects than the 100 queries"),
}  # fmt: skip

# What one file can hold at the same time; the others leave nothing of it to find anything in.
AT_ONCE = [
    "image id twice", "file name twice", "category id twice", "of no image", "of no category", "no area",
    "no iscrowd", "iscrowd yes", "bbox of 3", "bbox NaN", "zero size", "sub-pixel", "partly outside",
    "outside", "ids from 0", "other size", "missing", "unreadable", "path up", "crowd only", "names",
    "5000 objects",
]  # fmt: skip


def made(root: Path) -> Document:
    """20 pictures of 64x48 with two boxes each, of classes a model of ``conftest`` knows; the JSON is not written."""
    images, annotations = [], []
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "images" / f"{i + 1}.png")
        images.append({"id": i + 1, "file_name": f"{i + 1}.png", "width": 64, "height": 48})
        for k in range(2):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i + 1, "category_id": 1 + k, "area": 320, "iscrowd": 0,
                 "bbox": [30 * k + 2, 10, 16, 20]}
            )  # fmt: skip
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog\x1b[31m"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(params=["made", "coco_train40"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Document]:
    """A folder with images/ and annotations/ (val.json), and the document that is to become train.json."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    document = made(root)
    (root / "annotations/val.json").write_text(json.dumps(document))
    if request.param == "made":
        for image in document["images"]:
            image["file_name"] = f"train{image['id']}.png"
            shutil.copy(root / f"images/{image['id']}.png", root / "images" / image["file_name"])
            with open(root / "images" / image["file_name"], "ab") as file:
                file.write(b"not the picture of val, byte for byte")
        return root, document
    source: Path = request.getfixturevalue("data_dir") / "coco_train40"
    document = json.loads((source / "annotations/instances.json").read_text())
    for image in document["images"]:
        (root / "images" / image["file_name"]).symlink_to(source / "images" / image["file_name"])
    # The classes of val have to be among those trained on.
    val = json.loads((root / "annotations/val.json").read_text())
    val["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    (root / "annotations/val.json").write_text(json.dumps(val))
    return root, document


def write(root: Path, document: Document, case: Case | None = None) -> None:
    content = None
    if case is not None:
        content = case.spoil(document, root / "images")
    (root / "annotations/train.json").write_bytes(json.dumps(document).encode() if content is None else content)


def check(root: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main(["train", str(root), "--check", "--preset", "tiny", *options])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("name", CASES)
def test_check_names_the_fault_and_exits_as_training_would(
    name: str, data: tuple[Path, Document], capsys: pytest.CaptureFixture[str]
) -> None:
    case, (root, document) = CASES[name], data
    document["images"] = document["images"][:12]  # the others would cost time and show nothing new
    listed = {image["id"] for image in document["images"]}
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] in listed]
    write(root, document, case)
    code, text = check(root, capsys)
    assert case.says in text
    assert code == case.trains, text
    assert "\x1b" not in text
    assert len(max(text.splitlines(), key=len)) < 2000


def test_check_names_every_fault_of_a_file_that_has_them_all(
    data: tuple[Path, Document], capsys: pytest.CaptureFixture[str]
) -> None:
    root, document = data
    # Each spoils the head of its list, so the next one takes the head that is left.
    parts: dict[str, list[Any]] = {key: [] for key in ("images", "annotations", "categories")}
    for name in AT_ONCE:
        CASES[name].spoil(document, root / "images")
        for key in ("images", "annotations"):
            parts[key].append(document[key].pop(0))
    for key in ("images", "annotations"):
        document[key] = parts[key] + document[key]
    write(root, document)
    code, text = check(root, capsys)
    missing = [CASES[name].says for name in AT_ONCE if CASES[name].says not in text]
    assert missing == []
    assert code == REFUSED


@pytest.mark.parametrize("data", ["made"], indirect=True)
# Only its pixels show a picture that was cut off: --check decodes them, a training meets them on its way.
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.trains == REFUSED and n != "cut off"])
def test_training_is_refused_before_anything_is_written(
    name: str, data: tuple[Path, Document], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    case, (root, document) = CASES[name], data
    write(root, document, case)
    assert main(["train", str(root), "--preset", "tiny", "--device", "cpu", "-o", str(tmp_path / "run")]) == 6
    assert case.says in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock"] == []


def predictions(document: Document, path: Path) -> Path:
    """Every box of ``document`` found exactly; ids as they are in it."""
    rows = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in document["annotations"]
    ]
    path.write_text(json.dumps(rows))
    return path


# What the clean predictions score where the fault is repaired; the others lose or gain an object.
PERFECT = [
    "BOM", "no info", "ids from 0", "ids equal", "ids missing", "no area", "no iscrowd", "iscrowd text", "names",
    "turned",
]  # fmt: skip
PICTURES = ["other size", "turned", "missing", "unreadable", "cut off", "path up", "path absolute"]


@pytest.mark.parametrize("data", ["made"], indirect=True)
@pytest.mark.parametrize("name", [name for name in CASES if name not in PICTURES])
def test_eval_refuses_the_fault_or_scores_as_if_it_were_not_there(
    name: str, data: tuple[Path, Document], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    case, (root, document) = CASES[name], data
    results = predictions(document, tmp_path / "results.json")
    write(root, document, case)
    if "ids" in name or "classes" in name:
        predictions(document, results)
    out = tmp_path / "out"
    code = main(["eval", str(root), "--split", "train", "--predictions", str(results), "--output", str(out)])
    text = capsys.readouterr().err
    assert code == case.scores, text
    if code == REFUSED:
        assert case.says in text
        assert not out.exists()
    elif name in PERFECT:
        assert json.loads((out / "metrics.json").read_text())["AP"] == pytest.approx(1)


@pytest.mark.parametrize("data", ["made"], indirect=True)
@pytest.mark.parametrize("name", PICTURES)
def test_eval_of_a_model_refuses_pictures_that_are_not_those_annotated(
    name: str, data: tuple[Path, Document], capsys: pytest.CaptureFixture[str], model: str
) -> None:
    case, (root, document) = CASES[name], data
    write(root, document, case)
    assert main(["eval", str(root), "--split", "train", "--model", model, "--device", "cpu"]) == case.scores
    if case.scores == REFUSED and name != "cut off":
        assert case.says in capsys.readouterr().err


@pytest.mark.parametrize("data", ["made"], indirect=True)
def test_eval_drops_zero_sized_boxes_and_counts_sub_pixel_ones(
    data: tuple[Path, Document], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root, document = data
    document["annotations"][0]["bbox"] = [5, 5, 0, 9]
    document["annotations"][1]["bbox"] = [5, 5, 0.5, 9]
    results = predictions(document, tmp_path / "results.json")
    rows = json.loads(results.read_text())[1:]
    results.write_text(json.dumps(rows))
    write(root, document)
    out = tmp_path / "out"
    assert main(["eval", str(root), "--split", "train", "--predictions", str(results), "--output", str(out)]) == 0
    assert "1 of 40 annotations dropped: bbox without width or height" in capsys.readouterr().err
    assert json.loads((out / "metrics.json").read_text())["AP"] == pytest.approx(1)


@pytest.mark.parametrize("data", ["made"], indirect=True)
@pytest.mark.parametrize(("name", "option"), [("bbox NaN", "--skip-bad-annotations"), ("missing", "--skip-missing")])
def test_the_skip_options_leave_out_a_few_and_no_more(
    name: str, option: str, data: tuple[Path, Document], capsys: pytest.CaptureFixture[str]
) -> None:
    root, document = data
    write(root, document, CASES[name])
    code, text = check(root, capsys, option)
    assert code == 0, text
    assert " dropped: " in text and CASES[name].says in text
    code, text = check(root, capsys, option, "--max-bad", "0.01")
    assert code == 6
    assert "more than the 0.01 of all" in text
    assert f"that {option} may drop" in text


@pytest.mark.parametrize("data", ["made"], indirect=True)
def test_five_examples_and_the_count_are_named(
    data: tuple[Path, Document], capsys: pytest.CaptureFixture[str]
) -> None:
    root, document = data
    write(root, document, Case(each("annotations", lambda a, _: a.update(bbox=None), 7), ""))
    _, text = check(root, capsys)
    listed = ", ".join(f"annotation id {n}: None" for n in range(1, 6))
    assert f"7 of 40 annotations: bbox is not four finite numbers ({listed}, ...)" in text


@pytest.mark.parametrize("data", ["made"], indirect=True)
def test_pictures_that_train_and_val_share_are_named_by_path_and_by_content(
    data: tuple[Path, Document], capsys: pytest.CaptureFixture[str]
) -> None:
    root, document = data
    document["images"][0]["file_name"] = "1.png"
    shutil.copy(root / "images/2.png", root / "images" / document["images"][1]["file_name"])
    write(root, document)
    code, text = check(root, capsys)
    assert code == 0
    assert "1 of 20 images: of val are trained on too: the validation numbers will be too good (1.png)" in text
    assert "1 of 20 images: of val are copies of training pictures" in text
    assert "(2.png is train2.png)" in text


@pytest.mark.parametrize("data", ["made"], indirect=True)
def test_training_on_odd_ids_names_and_5000_objects_ends_in_a_model_with_the_files_own_categories(
    data: tuple[Path, Document], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from ddetr_cli.weights import load_model

    root, document = data
    for name in ("huge ids", "5000 objects", "background", "partly outside"):
        CASES[name].spoil(document, root / "images")
    document["categories"] = [{"id": 5000, "name": "dog\x1b[31m"}, {"id": 0, "name": "cat"}, {"id": 7, "name": "cat"}]
    for annotation in document["annotations"]:
        annotation["category_id"] = {1: 0, 2: 5000}[annotation["category_id"]]
    write(root, document)
    shutil.copy(root / "annotations/train.json", root / "annotations/val.json")
    run = tmp_path / "run"
    arguments = ["--preset", "tiny", "--epochs", "1", "--image-size", "32", "--queries", "9", "--batch-size", "20"]
    assert main(["train", str(root), "--device", "cpu", "-o", str(run), *arguments]) == 0
    classes = load_model(str(run)).classes
    assert classes.category_ids == (0, 7, 5000)
    assert classes.names == ("cat", "cat", "dog\x1b[31m")
    text = capsys.readouterr().err
    assert "of val are trained on too" in text
    assert "bbox partly outside its image, clipped" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("data", ["made"], indirect=True)
def test_eval_leaves_out_a_bad_box_on_request_and_says_so(
    data: tuple[Path, Document], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root, document = data
    results = predictions(document, tmp_path / "results.json")
    write(root, document, CASES["bbox NaN"])
    arguments = ["eval", str(root), "--split", "train", "--predictions", str(results), "--skip-bad-annotations"]
    assert main(arguments) == 0
    assert "1 of 40 annotations dropped: bbox is not four finite numbers" in capsys.readouterr().err
    assert main([*arguments, "--max-bad", "0"]) == 6
