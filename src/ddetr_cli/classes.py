"""Class tables: what each index of the class head means, as (category id, name).

COCO models index the head by the COCO category id itself (91 logits, eleven of them unnamed); every other data
set by the rank of its category ids. Results always carry the table's category ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CategoryId = int | str

# COCO 2017's 80 categories by category id; the ids between them that are missing were never released.
COCO_NAMES: dict[int, str] = {
    1: "person",
    2: "bicycle",
    3: "car",
    4: "motorcycle",
    5: "airplane",
    6: "bus",
    7: "train",
    8: "truck",
    9: "boat",
    10: "traffic light",
    11: "fire hydrant",
    13: "stop sign",
    14: "parking meter",
    15: "bench",
    16: "bird",
    17: "cat",
    18: "dog",
    19: "horse",
    20: "sheep",
    21: "cow",
    22: "elephant",
    23: "bear",
    24: "zebra",
    25: "giraffe",
    27: "backpack",
    28: "umbrella",
    31: "handbag",
    32: "tie",
    33: "suitcase",
    34: "frisbee",
    35: "skis",
    36: "snowboard",
    37: "sports ball",
    38: "kite",
    39: "baseball bat",
    40: "baseball glove",
    41: "skateboard",
    42: "surfboard",
    43: "tennis racket",
    44: "bottle",
    46: "wine glass",
    47: "cup",
    48: "fork",
    49: "knife",
    50: "spoon",
    51: "bowl",
    52: "banana",
    53: "apple",
    54: "sandwich",
    55: "orange",
    56: "broccoli",
    57: "carrot",
    58: "hot dog",
    59: "pizza",
    60: "donut",
    61: "cake",
    62: "chair",
    63: "couch",
    64: "potted plant",
    65: "bed",
    67: "dining table",
    70: "toilet",
    72: "tv",
    73: "laptop",
    74: "mouse",
    75: "remote",
    76: "keyboard",
    77: "cell phone",
    78: "microwave",
    79: "oven",
    80: "toaster",
    81: "sink",
    82: "refrigerator",
    84: "book",
    85: "clock",
    86: "vase",
    87: "scissors",
    88: "teddy bear",
    89: "hair drier",
    90: "toothbrush",
}


@dataclass(frozen=True)
class ClassTable:
    """Index of the class head -> (category id, name); ``None`` marks an index without a name."""

    category_ids: tuple[CategoryId, ...]
    names: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if len(self.category_ids) != len(self.names):
            raise ValueError(f"{len(self.category_ids)} category ids but {len(self.names)} names")

    def __len__(self) -> int:
        return len(self.category_ids)

    def name(self, index: int) -> str:
        """What to show for one index: its name, or ``class 26`` where there is none."""
        return self.names[index] or f"class {self.category_ids[index]}"

    def index_of(self) -> dict[CategoryId, int]:
        """Category id -> index of the class head."""
        return {category_id: index for index, category_id in enumerate(self.category_ids)}

    def to_categories(self) -> list[dict[str, Any]]:
        """COCO ``categories`` of every index, named ones and unnamed ones."""
        return [{"id": self.category_ids[i], "name": self.name(i)} for i in range(len(self))]

    def to_json(self) -> list[list[Any]]:
        """``[[category id, name or null], ...]``, as checkpoints store it."""
        return [list(pair) for pair in zip(self.category_ids, self.names, strict=True)]

    @classmethod
    def from_json(cls, rows: Iterable[Iterable[Any]]) -> ClassTable:
        """The inverse of ``to_json``."""
        pairs = [tuple(row) for row in rows]
        return cls(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    @classmethod
    def from_categories(cls, categories: Iterable[Mapping[str, Any]]) -> ClassTable:
        """The table of a data set: COCO's own for exactly COCO's 80 categories, else ranked by category id."""
        named: dict[CategoryId, str] = {category["id"]: str(category["name"]) for category in categories}
        if named == COCO_NAMES:
            return COCO_TABLE
        # Numbers first and by value, then strings: "10" after "9" is not promised by any exporter.
        ids = sorted(named, key=lambda i: (isinstance(i, str), i if isinstance(i, (int, float)) else 0, str(i)))
        return cls(tuple(ids), tuple(named[i] for i in ids))


COCO_TABLE = ClassTable(tuple(range(91)), tuple(COCO_NAMES.get(i) for i in range(91)))
