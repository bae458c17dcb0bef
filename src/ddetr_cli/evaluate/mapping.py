"""Which category of a data set each class of a model is.

A model trained on the data set (equal ids and names) needs no mapping. Any other is mapped by name, and what it
predicts that the data set does not have must be named rather than quietly lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ddetr_cli.classes import CategoryId, ClassTable
from ddetr_cli.data.coco import CocoCategory
from ddetr_cli.data.jsonfile import some
from ddetr_cli.errors import DatasetError, DdetrError

MapMissing = Literal["error", "drop"]


@dataclass(frozen=True)
class ClassMapping:
    """``category_ids[index]`` is the data set's category of a class index, None where it has no counterpart.

    ``is_identity`` where ids and names were equal; then unnamed classes keep their own ids, which nothing scores.
    """

    table: ClassTable
    category_ids: tuple[CategoryId | None, ...]
    names: tuple[str | None, ...]
    is_identity: bool

    def require(self, index: int) -> None:
        """Raise DatasetError where class ``index`` has no counterpart."""
        if self.category_ids[index] is None:
            raise DatasetError(
                f"class {self.table.name(index)!r}: predicted by the model, but not a category of the data set. "
                "Use --map-missing drop to leave such detections out, or give a model trained on these categories."
            )

    def describe(self) -> list[str]:
        """One line per class: ``model class 3 "car" -> category 7 "car"``; none for the identity."""
        if self.is_identity:
            return []
        lines = []
        for index, (category_id, name) in enumerate(zip(self.category_ids, self.names, strict=True)):
            if category_id is not None:
                lines.append(f'model class {index} "{self.table.name(index)}" -> category {category_id} "{name}"')
        unmatched = [
            self.table.name(index)
            for index, category_id in enumerate(self.category_ids)
            if category_id is None and self.table.names[index] is not None
        ]
        if unmatched:
            lines.append(f"model classes without a counterpart: {', '.join(unmatched)}")
        return lines


def map_classes(
    table: ClassTable, categories: Sequence[CocoCategory], *, mismatch: type[DdetrError] = DatasetError
) -> ClassMapping:
    """The mapping of ``table`` onto the categories of a data set: identity for equal (id, name) pairs, else by name.

    Of several categories with one name the one with the class's id is meant. A name without an exact counterpart may
    match in other case where that is unambiguous ("RBC", "rbc"). Raises ``mismatch`` where no class has a
    counterpart, DatasetError where it cannot be told which of two categories of one name is meant.
    """
    named = {
        (category_id, name)
        for category_id, name in zip(table.category_ids, table.names, strict=True)
        if name is not None
    }
    if named == {(category.id, category.name) for category in categories}:
        return ClassMapping(table, table.category_ids, table.names, is_identity=True)
    matches = [
        None if name is None else _match(category_id, name, categories)
        for category_id, name in zip(table.category_ids, table.names, strict=True)
    ]
    if not any(matches):
        raise mismatch(
            f"categories: none of the data set's ({some([c.name for c in categories])}) is a class of the model "
            f"({some([name for name in table.names if name is not None])}). Give a model trained on them."
        )
    return ClassMapping(
        table,
        tuple(match.id if match else None for match in matches),
        tuple(match.name if match else None for match in matches),
        is_identity=False,
    )


def _match(category_id: CategoryId, name: str, categories: Sequence[CocoCategory]) -> CocoCategory | None:
    exact = [category for category in categories if category.name == name]
    if len(exact) > 1:
        same_id = [category for category in exact if category.id == category_id]
        if same_id:
            return same_id[0]
        raise DatasetError(
            f"category name {name!r}: belongs to {len(exact)} categories (ids {some([str(c.id) for c in exact])}), "
            "so the model's class of that name cannot be mapped. Give the categories different names."
        )
    if exact:
        return exact[0]
    folded = Counter(category.name.casefold() for category in categories)
    if folded[name.casefold()] != 1:
        return None
    return next(category for category in categories if category.name.casefold() == name.casefold())
