"""The ways people keep a data set in a folder, and the splits found there.

COCO   annotations/instances_<split>.json beside <split>/ or images/; or <split>/_annotations.coco.json among the
       pictures; or JSON files at the top of the folder
YOLO   data.yaml, which names the classes and the folders of pictures; their labels in labels/ instead of images/
VOC    Annotations/*.xml beside JPEGImages/ (or images/), splits in ImageSets/Main/<split>.txt; or XML files among the
       pictures of train/, valid/ and test/, or of the folder itself
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Layout = Literal["coco", "voc", "yolo"]

# COCO ships these beside instances_*; they hold no boxes to train or score on.
_OTHER_KINDS = ("captions_", "person_keypoints_", "image_info_", "stuff_", "panoptic_")
_SPLIT_FOLDERS = ("train2017", "val2017", "train", "valid", "val", "test")
_WHOLE = "all"  # the split of a folder that knows no splits
_YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")


@dataclass(frozen=True)
class DatasetPaths:
    """One split: its folder of images (None where none was found or needed) and its annotations.

    ``annotations`` is the JSON file of COCO, the data.yaml of YOLO, or the folder of XML files of VOC; ``listing``
    the text file that names the pictures of a VOC split. ``val`` is the split to validate on, only set for training
    and only where there is one; without it the trainer holds out a part of the training images.
    """

    images: Path | None
    annotations: Path
    split: str
    layout: Layout = "coco"
    listing: Path | None = None
    val: DatasetPaths | None = None


def find_splits(root: Path) -> dict[str, DatasetPaths]:
    """Split name -> where it is, of the first layout that fits ``root``; empty where none does."""
    return (
        _json_splits(root, root / "annotations")
        or _splits_with_own_json(root)
        or _yolo_splits(root)
        or _voc_splits(root)
        or _json_splits(root, root)
    )


def has_annotations(root: Path) -> bool:
    """Whether ``root`` holds a folder of annotations beside its folders of images."""
    return (root / "annotations").is_dir() or (root / "Annotations").is_dir()


def split_name(annotations: Path) -> str:
    """The split an annotation file is of, by its name."""
    return annotations.stem.removeprefix("instances_")


def image_folder(root: Path, split: str) -> Path | None:
    """The folder of a split's pictures; ``root`` itself where it holds neither that nor annotations."""
    for folder in (root / split, root / "images" / split, root / "images", root / "JPEGImages"):
        if folder.is_dir():
            return folder
    return None if has_annotations(root) else root


def _json_splits(root: Path, folder: Path) -> dict[str, DatasetPaths]:
    """COCO's own instances_* win over plain names, and its other kinds are left out."""
    found: dict[str, DatasetPaths] = {}
    for file in sorted(folder.glob("*.json")):
        name = split_name(file)
        if not file.name.startswith(_OTHER_KINDS) and (name not in found or file.stem.startswith("instances_")):
            found[name] = DatasetPaths(image_folder(root, name), file, name)
    return found


def _splits_with_own_json(root: Path) -> dict[str, DatasetPaths]:
    files = {name: root / name / "_annotations.coco.json" for name in _SPLIT_FOLDERS}
    return {name: DatasetPaths(file.parent, file, name) for name, file in files.items() if file.is_file()}


def _yolo_splits(root: Path) -> dict[str, DatasetPaths]:
    file = next((root / name for name in _YAML_NAMES if (root / name).is_file()), None)
    return {} if file is None else yolo_splits(file)


def yolo_splits(file: Path) -> dict[str, DatasetPaths]:
    """The splits a data.yaml names. Raises DatasetError where it cannot be read."""
    from ddetr_cli.data.datayaml import read_data_yaml

    splits = read_data_yaml(file).splits
    return {name: DatasetPaths(folder, file, name, "yolo") for name, folder in splits.items()}


def _voc_splits(root: Path) -> dict[str, DatasetPaths]:
    for folder in (root / "Annotations", root / "annotations"):
        if _has_xml(folder):
            images = image_folder(root, "images")
            listings = sorted(root.glob("ImageSets/Main/*.txt"))
            # Files such as cat_train.txt say which pictures have a cat.
            names = {file.stem: file for file in listings if "_" not in file.stem}
            if not names:
                return {_WHOLE: DatasetPaths(images, folder, _WHOLE, "voc")}
            return {name: DatasetPaths(images, folder, name, "voc", file) for name, file in names.items()}
    found = {
        name: DatasetPaths(root / name, root / name, name, "voc") for name in _SPLIT_FOLDERS if _has_xml(root / name)
    }
    if not found and _has_xml(root):
        return {_WHOLE: DatasetPaths(root, root, _WHOLE, "voc")}
    return found


def voc_folders(paths: DatasetPaths) -> list[Path]:
    """The folders with XML files of all splits that ``paths`` is one of."""
    folder = paths.annotations
    if folder != paths.images or folder.name not in _SPLIT_FOLDERS:
        return [folder]
    return [other for name in _SPLIT_FOLDERS if _has_xml(other := folder.parent / name)] or [folder]


def _has_xml(folder: Path) -> bool:
    return next(folder.glob("*.xml"), None) is not None
