"""What the layouts share: counters that are no weights, rules that rename, and the neck of the OpenMMLab family."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Counters that training tools leave among the weights and no computation reads.
_COUNTERS = ("total_ops", "total_params", "num_batches_tracked")

Rules = tuple[tuple[re.Pattern[str], str], ...]


def is_counter(name: str) -> bool:
    """Whether a tensor is bookkeeping of a training tool, not a weight."""
    return name.rsplit(".", 1)[-1] in _COUNTERS


def rules(*pairs: tuple[str, str]) -> Rules:
    """(pattern, replacement) pairs, to be applied in their order."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def renamed(name: str, given: Rules) -> str:
    """``name`` after every rule."""
    for pattern, replacement in given:
        name = pattern.sub(replacement, name)
    return name


# The OpenMMLab family numbers a layer's norms in the order in which they come, the authors not quite.
NORM_RULES = rules(
    (r"(\.encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
    (r"(\.encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2."),
    (r"(\.decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm2."),
    (r"(\.decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm1."),
    (r"(\.decoder\.layers\.\d+)\.norms\.2\.", r"\1.norm3."),
)


def neck_rules(names: Iterable[str]) -> Rules:
    """Rules for the projections of the OpenMMLab family: one per map of the trunk, then numbered anew the extra ones.

    The names of the file tell where the extra ones begin.
    """
    first = len({match[1] for name in names if (match := re.match(r"neck\.convs\.(\d+)\.", name))})
    extra = ((rf"^neck\.extra_convs\.{k}\.", f"input_proj.{first + k}.") for k in range(8))
    return rules(
        (r"^neck\.convs\.", "input_proj."),
        *extra,
        (r"^(input_proj\.\d+)\.conv\.", r"\1.0."),
        (r"^(input_proj\.\d+)\.(norm|gn)\.", r"\1.1."),
    )
