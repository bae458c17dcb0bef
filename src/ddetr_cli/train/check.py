"""``ddetr train --check``: a data set read as a training reads it, only closer, and what is in it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ddetr_cli.data.coco import CocoAnnotations, image_path
from ddetr_cli.data.findings import EXAMPLES, Finding
from ddetr_cli.data.pixels import network_size
from ddetr_cli.presets import ModelConfig, get_preset
from ddetr_cli.train.options import TrainOptions
from ddetr_cli.train.splits import Inspection, Split, Splits, crowded_images, inspect_splits
from ddetr_cli.train.start import DEFAULT_PRESET

# Of more than this the pixels of every n-th picture are decoded: half a minute of one core for photographs.
DECODED_PIXELS = 2_000_000_000
SMALL, MEDIUM = 32**2, 96**2  # COCO's limits of an object's area in pixels
FEW_PIXELS = 16  # at the network's size an object under this is about one cell of its second finest map


@dataclass(frozen=True)
class SplitFacts:
    """What there is in one split; boxes are those to find, without crowd regions.

    ``few_pixels`` counts boxes whose sqrt(w*h) is under 16 px at the size the network sees. Headers are read
    of all pictures, the pixels of every ``decoded_every``-th decoded.
    """

    annotations: str
    image_folder: str
    images: int
    images_without_boxes: int
    decoded_every: int
    boxes: int
    crowd_regions: int
    small: int
    medium: int
    large: int
    few_pixels: int
    boxes_per_image_median: float
    boxes_per_image_most: int
    commonest_size: tuple[int, int]
    commonest_size_share: float
    aspect_least: float
    aspect_most: float
    boxes_per_class: dict[str, int]


@dataclass(frozen=True)
class DataReport:
    """The facts of train and val (None where it cannot be read), and the findings with the part they are of."""

    config: ModelConfig
    train: SplitFacts | None
    val: SplitFacts | None
    findings: tuple[tuple[str, Finding], ...]

    @property
    def refused(self) -> int:
        """How many kinds of faults keep a training from starting."""
        return sum(finding.outcome == "refused" for _, finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The content of check.json."""
        return {
            "trainable": not self.refused,
            "preset": self.config.preset,
            "image_size": self.config.image_size,
            "queries": self.config.queries,
            "train": asdict(self.train) if self.train else None,
            "val": asdict(self.val) if self.val else None,
            "findings": [{"split": part, **asdict(finding)} for part, finding in self.findings],
        }


class _Closer(Inspection):
    """Decodes pixels too: of all pictures where that takes no more than half a minute, else of every n-th."""

    def __init__(self, begin: Callable[[int], None], advance: Callable[[], None]) -> None:
        self._begin, self._advance = begin, advance
        self.decoded_every: list[int] = []

    def positions_to_decode(self, annotations: CocoAnnotations) -> Collection[int]:
        pixels = sum(image.width * image.height for image in annotations.images)
        every = 1 + pixels // DECODED_PIXELS
        self.decoded_every.append(every)
        return range(0, len(annotations.images), every)

    def begin(self, count: int) -> None:
        self._begin(count)

    def advance(self) -> None:
        self._advance()


def check_data(options: TrainOptions, *, begin: Callable[[int], None], advance: Callable[[], None]) -> DataReport:
    """Everything a training with ``options`` would meet in its data set, and would do about it; nothing is written.

    ``begin`` is called with the number of pictures of each split, ``advance`` after each picture. Raises UsageError
    where there is no data set, CheckpointError where ``options.init`` cannot be read.
    """
    config = _config(options)
    closer = _Closer(begin, advance)
    splits = inspect_splits(options, closer)
    findings = [("train", f) for f in splits.train.annotations.findings]
    findings += [("train", f) for f in crowded_images(splits.train, config.queries)]
    findings += [("val", f) for f in splits.val.annotations.findings]
    findings += [("train and val", f) for f in splits.findings]
    # One number where val is held out of train, none where no folder of pictures was found.
    decoded = closer.decoded_every or [0]
    if decoded == [1, 1]:
        findings += [("train and val", f) for f in _same_content(splits)]
    return DataReport(
        config,
        _facts(splits.train, config, decoded[0]),
        _facts(splits.val, config, decoded[-1]),
        tuple(findings),
    )


def _config(options: TrainOptions) -> ModelConfig:
    """The model that would be trained, as far as its data set matters to it."""
    if options.init is not None:
        from ddetr_cli.weights import load_model

        config = load_model(options.init, preset=options.preset).config
    else:
        config = get_preset(options.preset or DEFAULT_PRESET)
    wanted = {"image_size": options.image_size, "queries": options.queries}
    changes: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    return replace(config, **changes)


def _facts(split: Split, config: ModelConfig, decoded_every: int) -> SplitFacts | None:
    data = split.annotations
    if not data.images:
        return None
    boxes = [annotation for annotation in data.annotations if not annotation.iscrowd]
    per_image = Counter(annotation.image_id for annotation in boxes)
    counts = [per_image[image.id] for image in data.images]
    scales = {
        image.id: network_size(image.width, image.height, config.image_size)[1] / image.width for image in data.images
    }
    sizes = Counter((image.width, image.height) for image in data.images)
    (commonest, times), *_ = sizes.most_common(1)
    aspects = [width / height for width, height in sizes]
    per_class = Counter(annotation.category_id for annotation in boxes)
    names = Counter(category.name for category in data.categories)
    return SplitFacts(
        annotations=str(data.path),
        image_folder=str(split.images),
        images=len(data.images),
        images_without_boxes=counts.count(0),
        decoded_every=decoded_every,
        boxes=len(boxes),
        crowd_regions=len(data.annotations) - len(boxes),
        small=sum(annotation.area < SMALL for annotation in boxes),
        medium=sum(SMALL <= annotation.area < MEDIUM for annotation in boxes),
        large=sum(annotation.area >= MEDIUM for annotation in boxes),
        few_pixels=sum(a.bbox_xywh[2] * a.bbox_xywh[3] * scales[a.image_id] ** 2 < FEW_PIXELS**2 for a in boxes),
        boxes_per_image_median=median(counts),
        boxes_per_image_most=max(counts),
        commonest_size=commonest,
        commonest_size_share=times / len(data.images),
        aspect_least=min(aspects),
        aspect_most=max(aspects),
        boxes_per_class={
            c.name if names[c.name] == 1 else f"{c.name} (id {c.id})": per_class[c.id] for c in data.categories
        },
    )


def _same_content(splits: Splits) -> tuple[Finding, ...]:
    """Pictures of val that are a training picture byte for byte, under whatever name."""
    by_size: dict[int, list[Path]] = {}
    for image in splits.train.annotations.images:
        path = image_path(splits.train.images, image)
        by_size.setdefault(path.stat().st_size, []).append(path)
    digests: dict[Path, bytes] = {}

    def digest(path: Path) -> bytes:
        if path not in digests:
            digests[path] = hashlib.sha256(path.read_bytes()).digest()
        return digests[path]

    same = []
    for image in splits.val.annotations.images:
        path = image_path(splits.val.images, image)
        twins = by_size.get(path.stat().st_size, [])
        twin = next((t for t in twins if t.resolve() != path.resolve() and digest(t) == digest(path)), None)
        if twin is not None:
            same.append(f"{image.file_name} is {twin.name}")
    if not same:
        return ()
    what = "of val are copies of training pictures: the validation numbers will be too good"
    count = len(splits.val.annotations.images)
    return (Finding("noted", what, len(same), count, "images", tuple(same[:EXAMPLES])),)
