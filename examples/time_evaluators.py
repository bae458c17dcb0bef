#!/usr/bin/env python3
"""Time ddetr's evaluator and pycocotools on a made-up data set of val2017's size, each in a process of its own.

    python examples/time_evaluators.py [--images 5000] [--objects 36000] [--detections 500000] [--rounds 1]

From the results file to the twelve numbers: seconds, processor seconds and peak memory of every process, then the
ratios of the medians, and whether all numbers are equal to the last bit. At the default size pycocotools takes
minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CLASSES = 80
PYCOCOTOOLS = """
import contextlib, io, json, sys
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO(sys.argv[1])
    found = COCOeval(truth, truth.loadRes(sys.argv[2]), "bbox")
    found.evaluate(), found.accumulate(), found.summarize()
print(json.dumps(found.stats.tolist()))
"""
DDETR = """
import json, sys
from pathlib import Path
from ddetr_cli.data.annotations import read_annotations
from ddetr_cli.evaluate.metrics import evaluate_detections
from ddetr_cli.evaluate.predictions import read_predictions
truth = read_annotations(Path(sys.argv[1]))
found = evaluate_detections(truth, read_predictions([Path(sys.argv[2])], truth)).overall
print(json.dumps([-1.0 if value is None else value for value in found.values()]))
"""


def make(truth: Path, answers: Path, images: int, objects: int, detections: int) -> None:
    """Write objects of COCO-like sizes, and detections of which six in ten are near one."""
    random = np.random.default_rng(1)
    image, kind = random.integers(0, images, objects), random.integers(0, CLASSES, objects)
    size = np.exp(random.normal(4, 0.9, (objects, 2))).clip(4, 400)
    boxes = np.concatenate([random.uniform(0, 1, (objects, 2)) * (500 - size), size], axis=1).round(2)
    near = random.integers(0, objects, detections)
    is_near = random.random(detections) < 0.6
    found = boxes[near] + random.normal(0, 0.12, (detections, 4)) * boxes[near][:, [2, 3, 2, 3]]
    lost = np.concatenate([random.uniform(0, 400, (detections, 2)), random.uniform(5, 200, (detections, 2))], axis=1)
    found = np.where(is_near[:, None], found, lost).astype(np.float32).astype(float)
    found[:, 2:] = found[:, 2:].clip(1)
    where = np.where(is_near, image[near], random.integers(0, images, detections))
    label = np.where(is_near & (random.random(detections) < 0.8), kind[near], random.integers(0, CLASSES, detections))
    scores = np.where(is_near, random.beta(2, 3, detections), random.beta(1, 9, detections)).astype(np.float32)
    document = {
        "images": [{"id": i + 1, "file_name": f"{i}.jpg", "width": 640, "height": 640} for i in range(images)],
        "annotations": [
            {"id": n + 1, "image_id": int(image[n]) + 1, "category_id": int(kind[n]) + 1, "bbox": boxes[n].tolist(),
             "area": float(boxes[n, 2] * boxes[n, 3]), "iscrowd": int(n % 100 == 0)}
            for n in range(objects)
        ],
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(CLASSES)],
    }  # fmt: skip
    results = [
        {"image_id": int(where[n]) + 1, "category_id": int(label[n]) + 1, "bbox": found[n].tolist(),
         "score": float(scores[n])}
        for n in np.argsort(where, kind="stable")
    ]  # fmt: skip
    truth.write_text(json.dumps(document))
    answers.write_text(json.dumps(results))


def run(program: str, truth: Path, results: Path) -> tuple[float, float, float, list[float]]:
    """(seconds, processor seconds, peak memory in MB, the twelve numbers) of one process."""
    answer, end = os.pipe()
    start = time.perf_counter()
    process = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", program, str(truth), str(results)],
        os.environ | {"OMP_NUM_THREADS": "1"},
        file_actions=[(os.POSIX_SPAWN_DUP2, end, 1)],
    )
    os.close(end)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    with open(answer) as file:
        text = file.read()
    if status:
        sys.exit(f"a process failed (status {status})")
    megabytes = usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return seconds, usage.ru_utime + usage.ru_stime, megabytes, json.loads(text)


def main() -> None:
    """Make the data, let the two take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=36_000)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    programs = {"ddetr": DDETR, "pycocotools": PYCOCOTOOLS}
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in programs}
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "truth.json", Path(folder) / "results.json"
        # In a process of its own: a peak of this one would be counted as one of those it starts.
        sizes = (options.images, options.objects, options.detections)
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(*files, *sizes))
        maker.start()
        maker.join()
        for _ in range(options.rounds):
            for name, program in programs.items():
                *figures, numbers = run(program, *files)
                taken[name].append(tuple(figures))  # type: ignore[arg-type]
                answers.append(numbers)
                print(f"{name:12} {figures[0]:8.2f} s {figures[1]:8.2f} CPU s {figures[2]:8.0f} MB", flush=True)
    for index, what in enumerate(("time", "processor time", "peak memory")):
        medians = [statistics.median(row[index] for row in taken[name]) for name in programs]
        print(f"{what}: pycocotools takes {medians[1] / medians[0]:.1f} times as much")
    print(f"numbers: {'equal to the last bit' if all(a == answers[0] for a in answers) else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
