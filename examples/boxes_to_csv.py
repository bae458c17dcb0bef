"""Turn what ``ddetr detect`` wrote into a table for a spreadsheet.

    python examples/boxes_to_csv.py OUT > boxes.csv

One row per box: file, class, score, and left, top, width, height in pixels of the upright picture. Needs nothing but
Python.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TextIO


def write_csv(out: Path, file: TextIO) -> int:
    """Write the boxes of the folder ``out`` into ``file``; returns how many."""
    document = json.loads((out / "images.json").read_text())
    files = {image["id"]: image["file_name"] for image in document["images"]}
    names = {category["id"]: category["name"] for category in document["categories"]}
    table = csv.writer(file)
    table.writerow(("file", "class", "score", "left", "top", "width", "height"))
    detections = json.loads((out / "detections.json").read_text())
    for found in detections:
        table.writerow((files[found["image_id"]], names[found["category_id"]], found["score"], *found["bbox"]))
    return len(detections)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/boxes_to_csv.py OUT > boxes.csv")
    write_csv(Path(sys.argv[1]), sys.stdout)
