"""Where the images and the annotation file of a data set are, found the way people keep them.

Known layouts: a COCO root (``annotations/instances_val2017.json`` beside ``val2017/``), the path of
``val2017/`` itself, and a folder with ``images/`` and ``annotations/<split>.json``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ddetr_cli.errors import UsageError

Purpose = Literal["train", "eval"]

EVAL_SPLITS = ("val2017", "val", "valid")
TRAIN_SPLITS = ("train2017", "train")
# COCO ships these beside instances_*; they hold no boxes to train or score on.
_OTHER_KINDS = ("captions_", "person_keypoints_", "image_info_", "stuff_", "panoptic_")


@dataclass(frozen=True)
class DatasetPaths:
    """One split: its folder of images (None where none was found or needed) and its annotation file.

    ``val`` is the split to validate on, only set for training and only where there is one; without it the
    trainer holds out a part of the training images.
    """

    images: Path | None
    annotations: Path
    split: str
    val: DatasetPaths | None = None


def locate_dataset(
    data: Path | None,
    *,
    split: str | None = None,
    images: Path | None = None,
    annotations: Path | None = None,
    purpose: Purpose = "eval",
) -> DatasetPaths:
    """The split of ``data`` to use, or exactly ``images`` and ``annotations`` where they are given.

    Without ``split``: eval takes val2017, val or valid, train takes train2017 or train and validates on the
    eval split; otherwise the only annotation file there is. A test split is used only when named. Raises
    UsageError naming what is missing, or listing the choices.
    """
    for given, option in ((images, "--images"), (data, "DATA")):
        if given is not None and not given.is_dir():
            hint = " Give a folder, or the file as --annotations." if given.is_file() else " Check the path."
            raise UsageError(f"{given}: {option} is not an existing folder.{hint}")
    if annotations is not None:
        if not annotations.exists():
            raise UsageError(f"{annotations}: no such annotation file. Check the path of --annotations.")
        name = split or _split_name(annotations)
        folder = images or (_image_folder(data, name) if data is not None else None)
        return DatasetPaths(folder, annotations, name)
    if data is None:
        raise UsageError("DATA: not given. Name a data set, or give --annotations FILE (and --images DIR).")
    root, own_split = _root_of(data)
    choices = _annotation_files(root)
    if not choices:
        raise UsageError(
            f"{data}: no annotation file found (looked for annotations/instances_<split>.json and "
            "annotations/<split>.json). Give --annotations FILE and --images DIR."
        )
    name = _choose(data, choices, split or own_split, purpose)
    folder = images or (data if name == own_split else _image_folder(root, name))
    found = DatasetPaths(folder, choices[name], name)
    if purpose == "train":
        val = next((v for v in EVAL_SPLITS if v in choices and v != name), None)
        if val is not None:
            found = replace(found, val=DatasetPaths(images or _image_folder(root, val), choices[val], val))
    return found


def _root_of(data: Path) -> tuple[Path, str | None]:
    """The folder that holds ``annotations/``, and the split that ``data`` is where it is an image folder itself."""
    if (data / "annotations").is_dir():
        return data, None
    # As it is written first: COCO roots often hold val2017/ as a link to a disk with no annotations beside it.
    for folder in (Path(os.path.abspath(data)), data.resolve()):
        roots = [folder.parent]  # root/val2017, root/images
        if folder.parent.name == "images":
            roots.append(folder.parent.parent)  # root/images/val2017
        for root in roots:
            if (root / "annotations").is_dir():
                return root, folder.name if folder.name in _annotation_files(root) else None
    return data, None


def _annotation_files(root: Path) -> dict[str, Path]:
    """Split name -> annotation file; COCO's own instances_* win over plain names and its other kinds are left out."""
    found: dict[str, Path] = {}
    for file in sorted((root / "annotations").glob("*.json")):
        if file.name.startswith(_OTHER_KINDS):
            continue
        name = _split_name(file)
        if name not in found or file.stem.startswith("instances_"):
            found[name] = file
    return found


def _split_name(annotations: Path) -> str:
    return annotations.stem.removeprefix("instances_")


def _choose(data: Path, choices: dict[str, Path], split: str | None, purpose: Purpose) -> str:
    listing = ", ".join(choices)
    if split is not None:
        name = split.removesuffix(".json").removeprefix("instances_")
        if name not in choices:
            raise UsageError(f"{data}: no split {split!r}. Choose --split from: {listing}.")
        return name
    wanted, unwanted = (EVAL_SPLITS, ()) if purpose == "eval" else (TRAIN_SPLITS, EVAL_SPLITS)
    for name in wanted:
        if name in choices:
            return name
    if len(choices) == 1:
        (only,) = choices
        if only not in unwanted and not only.startswith("test"):
            return only
    raise UsageError(
        f"{data}: no split called {', '.join(wanted[:-1])} or {wanted[-1]}. Choose --split from: {listing}."
    )


def _image_folder(root: Path, split: str) -> Path | None:
    for folder in (root / split, root / "images" / split, root / "images"):
        if folder.is_dir():
            return folder
    # An explicit folder of pictures beside --annotations; a root with neither has no images to offer.
    return None if (root / "annotations").is_dir() else root
