"""Parameters and FLOPs of the models, with the published figures beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddetr_cli.bench.flops import FLOPS_CONVENTION, ModelSize, mean_flops, measure_size
from ddetr_cli.bench.options import SIZES, BenchOptions
from ddetr_cli.bench.published import PUBLISHED, PUBLISHED_SHORT_SIDE, Published
from ddetr_cli.bench.subjects import BenchModel
from ddetr_cli.bench.tables import Listener, Table
from ddetr_cli.data.annotations import read_annotations
from ddetr_cli.data.locate import locate_dataset
from ddetr_cli.data.pixels import network_size

# Over how many pictures of val2017 the published FLOPs are a mean.
VAL_PICTURES = 100


@dataclass(frozen=True)
class SizeResult:
    """One model's size; ``val_flops`` is the mean over the first pictures of val2017, where it was given."""

    name: str
    preset: str
    size: ModelSize
    val_flops: float | None
    published: Published | None

    def difference(self, size_hw: tuple[int, int]) -> float | None:
        """Ours to the published FLOPs, -0.01 for 1 % less; None where nothing comparable was counted."""
        if self.published is None or (self.val_flops is None and min(size_hw) != PUBLISHED_SHORT_SIDE):
            return None
        ours = self.size.flops if self.val_flops is None else self.val_flops
        return ours / self.published.flops - 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; FLOPs of one picture."""
        return {
            "name": self.name,
            "preset": self.preset,
            "parameters": self.size.parameters,
            "trainable_parameters": self.size.trainable_parameters,
            "flops": self.size.flops,
            "flops_by_operation": self.size.flops_by_operation,
            "flops_val2017_mean": self.val_flops,
            "published_parameters": None if self.published is None else self.published.parameters,
            "published_flops": None if self.published is None else self.published.flops,
        }


@dataclass(frozen=True)
class SizesSection:
    """The sizes of all models at one picture size."""

    size_hw: tuple[int, int]
    results: tuple[SizeResult, ...]
    key: str = SIZES

    def to_json(self) -> list[dict[str, Any]]:
        """One object per model."""
        return [result.to_json() for result in self.results]

    def tables(self) -> list[Table]:
        """One row per model."""
        height, width = self.size_hw
        has_mean = any(result.val_flops is not None for result in self.results)
        rows = []
        for result in self.results:
            row = [
                result.name,
                f"{result.size.parameters / 1e6:.2f}",
                f"{result.size.trainable_parameters / 1e6:.2f}",
                f"{result.size.flops / 1e9:.1f}",
            ]
            if has_mean:
                row.append("" if result.val_flops is None else f"{result.val_flops / 1e9:.1f}")
            published = result.published
            if published is None:
                row += ["", "", ""]
            else:
                difference = result.difference(self.size_hw)
                row += [f"{published.parameters / 1e6:.0f}", f"{published.flops / 1e9:.0f}"]
                row.append("" if difference is None else f"{difference:+.1%}")
            rows.append(tuple(row))
        counted = f"mean over the first {VAL_PICTURES} of val2017" if has_mean else f"{height}x{width}"
        return [
            Table(
                "sizes",
                (
                    "model",
                    "params M",
                    "trained M",
                    f"GFLOPs {height}x{width}",
                    *(["GFLOPs val2017"] if has_mean else []),
                    "published params M",
                    "published GFLOPs",
                    "difference",
                ),
                tuple(rows),
                notes=(
                    f"GFLOPs: {FLOPS_CONVENTION}",
                    f"difference: ours ({counted}) to the published, a mean over 100 pictures of val2017",
                ),
            )
        ]


def measure_sizes(options: BenchOptions, models: Sequence[BenchModel], listener: Listener) -> SizesSection:
    """Count parameters and FLOPs of ``models``. Raises UsageError and DatasetError for a bad ``options.val2017``."""
    sizes_wh = [] if options.val2017 is None else first_picture_sizes(options.val2017)
    listener.expect(len(models))
    results = []
    for model in models:
        size = measure_size(model.model, options.size_hw)
        mean = None
        if sizes_wh:
            seen_hw = [network_size(width, height, model.config.image_size) for width, height in sizes_wh]
            mean = mean_flops(model.model, seen_hw)
        # The published figures are those of the preset as it stands, not of one fine-tuned on other classes.
        published = PUBLISHED.get(model.config.preset) if model.config.classes == 91 else None
        results.append(SizeResult(model.name, model.config.preset, size, mean, published))
        listener.ran()
    return SizesSection(options.size_hw, tuple(results))


def first_picture_sizes(path: Path) -> list[tuple[int, int]]:
    """(width, height) of the first pictures, by id, of the COCO data set or annotation file at ``path``."""
    annotations = path if path.is_file() else locate_dataset(path).annotations
    images = sorted(read_annotations(annotations).images, key=lambda image: str(image.id).zfill(20))
    return [(image.width, image.height) for image in images[:VAL_PICTURES]]
