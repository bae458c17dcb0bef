"""A data set in memory: images, categories and ground-truth boxes, with the ids of the file they came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ddetr_cli.classes import CategoryId, ClassTable
from ddetr_cli.data.findings import Finding, told

ImageId = int | str


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One listed picture; ``id`` is the file's own, unchanged.

    ``is_upright`` where width, height and boxes are those of the picture turned by its EXIF orientation (YOLO).
    """

    id: ImageId
    file_name: str
    width: int
    height: int
    is_upright: bool = False


@dataclass(frozen=True, slots=True)
class CocoCategory:
    """One class; ``id`` is the file's own, unchanged."""

    id: CategoryId
    name: str


@dataclass(frozen=True, slots=True)
class CocoAnnotation:
    """One ground-truth box in pixels; ``id`` is the file's own unless the ids had to be renumbered from 1."""

    id: ImageId
    image_id: ImageId
    category_id: CategoryId
    bbox_xywh: tuple[float, float, float, float]
    area: float
    iscrowd: bool


@dataclass(frozen=True)
class CocoAnnotations:
    """A validated annotation file; ``findings`` are what was odd in it, and what was done about that."""

    path: Path
    images: tuple[CocoImage, ...]
    annotations: tuple[CocoAnnotation, ...]
    categories: tuple[CocoCategory, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def repairs(self) -> tuple[str, ...]:
        """One sentence for each kind of repair, for the user to read."""
        return tuple(told(self.path, self.findings))

    @cached_property
    def by_image(self) -> Mapping[ImageId, tuple[CocoAnnotation, ...]]:
        """Image id -> its annotations, crowds included; an empty tuple for images without any."""
        lists: dict[ImageId, list[CocoAnnotation]] = {image.id: [] for image in self.images}
        for annotation in self.annotations:
            lists[annotation.image_id].append(annotation)
        return {image_id: tuple(annotations) for image_id, annotations in lists.items()}

    def class_table(self) -> ClassTable:
        """The table a model trained on this file gets."""
        return ClassTable.from_categories({"id": category.id, "name": category.name} for category in self.categories)

    def subset(self, images: Iterable[CocoImage]) -> CocoAnnotations:
        """The same file with only these of its images, and only their annotations."""
        kept = tuple(images)
        return replace(self, images=kept, annotations=tuple(a for image in kept for a in self.by_image[image.id]))
