"""Count what ``ddetr detect`` found: one line per class, most frequent first.

    python examples/count_objects.py OUT [--threshold 0.5]

OUT is the folder ``ddetr detect --output`` wrote. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path


def count_objects(out: Path, threshold: float) -> Counter[str]:
    """Detections of each class scoring at least ``threshold``."""
    names = {
        category["id"]: category["name"] for category in json.loads((out / "images.json").read_text())["categories"]
    }
    detections = json.loads((out / "detections.json").read_text())
    return Counter(names[found["category_id"]] for found in detections if found["score"] >= threshold)


def main() -> None:
    """Read the command line, print the counts."""
    parser = argparse.ArgumentParser(description="Count what ddetr detect found.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that ddetr detect wrote")
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score that counts (default 0.5)")
    options = parser.parse_args()
    for name, count in count_objects(options.out, options.threshold).most_common():
        print(f"{count:6d}  {name}")


if __name__ == "__main__":
    main()
