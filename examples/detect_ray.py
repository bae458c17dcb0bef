#!/usr/bin/env python3
"""Objects in the pictures of a folder or a bucket with Ray Data: a model per worker, a JSON row per picture.

    python examples/detect_ray.py s3://bucket/photos OUT --model demo --workers 8 --gpus 1

Needs ``pip install 'ddetr-cli[ray]'`` on every machine. Ray reads, spreads and retries; a picture that cannot be
read is a row with the reason.
"""

from __future__ import annotations

import argparse
import io
import json
from typing import Any

import ray
from PIL import Image

from ddetr_cli import Detector
from ddetr_cli.errors import ImageError


class Detect:
    """A worker: loads the model once, then takes batch after batch."""

    def __init__(self, model: str, threshold: float) -> None:
        self.detector = Detector(model, threshold=threshold)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        rows = [self.row(data) for data in batch["bytes"]]
        return {
            "path": list(batch["path"]),
            "detections": [found for found, _ in rows],
            "failed": [why for _, why in rows],
        }

    def row(self, data: bytes) -> tuple[str, str]:
        try:
            found = self.detector.detect(Image.open(io.BytesIO(data)))
        except (ImageError, OSError, ValueError, SyntaxError) as error:
            return "[]", str(error)
        boxes = [
            {"label": one.label, "score": one.score, "box": [one.box.x1, one.box.y1, one.box.x2, one.box.y2]}
            for one in found
        ]
        return json.dumps(boxes), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or URL")
    parser.add_argument("output", help="folder or URL for JSON lines")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker; 0.5 lets two share one")
    arguments = parser.parse_args()

    pictures = ray.data.read_binary_files(arguments.source, include_paths=True)
    found = pictures.map_batches(
        Detect,
        fn_constructor_args=(arguments.model, arguments.threshold),
        batch_size=16,
        concurrency=arguments.workers,
        num_gpus=arguments.gpus,
    )
    found.write_json(arguments.output)


if __name__ == "__main__":
    main()
