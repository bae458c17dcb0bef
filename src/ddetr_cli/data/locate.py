"""Which split of a data set a command works on, and where its images and annotations are."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ddetr_cli.data.layouts import (
    DatasetPaths,
    find_splits,
    has_annotations,
    image_folder,
    split_name,
    yolo_splits,
)
from ddetr_cli.errors import UsageError

__all__ = ["EVAL_SPLITS", "TRAIN_SPLITS", "DatasetPaths", "Purpose", "locate_dataset"]

Purpose = Literal["train", "eval"]

EVAL_SPLITS = ("val2017", "val", "valid")
TRAIN_SPLITS = ("train2017", "train")
_YAML = (".yaml", ".yml")


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
    eval split; otherwise the only split there is. A test split is used only when named. ``data`` may be a data.yaml
    itself. Raises UsageError naming what is missing, or listing the choices, and DatasetError for a data.yaml that
    cannot be read.
    """
    for given, option in ((images, "--images"), (data, "DATA")):
        if given is not None and not given.is_dir() and not (given is data and _is_data_yaml(given)):
            hint = " Give a folder, or the file as --annotations." if given.is_file() else " Check the path."
            raise UsageError(f"{given}: {option} is not an existing folder.{hint}")
    if annotations is not None:
        if not annotations.exists():
            raise UsageError(f"{annotations}: no such annotation file. Check the path of --annotations.")
        if not _is_data_yaml(annotations):
            name = split or split_name(annotations)
            folder = images or (image_folder(data, name) if data is not None else None)
            return DatasetPaths(folder, annotations, name, "voc" if annotations.is_dir() else "coco")
        data = annotations
    if data is None:
        raise UsageError("DATA: not given. Name a data set, or give --annotations FILE (and --images DIR).")
    root, own_split = _root_of(data)
    choices = yolo_splits(root) if _is_data_yaml(root) else find_splits(root)
    if not choices:
        raise UsageError(
            f"{data}: no annotations found (looked for annotations/instances_<split>.json, annotations/<split>.json, "
            "data.yaml, Annotations/*.xml). Give --annotations FILE and --images DIR."
        )
    name = _choose(data, choices, split or own_split, purpose)
    own_folder = data if name == own_split else None
    found = replace(choices[name], images=images or own_folder or choices[name].images)
    if purpose == "train":
        val = next((v for v in EVAL_SPLITS if v in choices and v != name), None)
        if val is not None:
            found = replace(found, val=replace(choices[val], images=images or choices[val].images))
    return found


def _is_data_yaml(path: Path) -> bool:
    return path.suffix.lower() in _YAML and path.is_file()


def _root_of(data: Path) -> tuple[Path, str | None]:
    """The folder that holds the annotations, and the split that ``data`` is where it is an image folder itself."""
    if has_annotations(data):
        return data, None
    # As it is written first: COCO roots often hold val2017/ as a link to a disk with no annotations beside it.
    for folder in (Path(os.path.abspath(data)), data.resolve()):
        roots = [folder.parent]  # root/val2017, root/images
        if folder.parent.name == "images":
            roots.append(folder.parent.parent)  # root/images/val2017
        for root in roots:
            if has_annotations(root):
                return root, folder.name if folder.name in find_splits(root) else None
    return data, None


def _choose(data: Path, choices: dict[str, DatasetPaths], split: str | None, purpose: Purpose) -> str:
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
