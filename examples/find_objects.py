"""Find objects from a program of your own: print them, and save the picture with their boxes.

    python examples/find_objects.py PICTURE... [--model demo] [--threshold 0.5] [--output DIR]

Prints one line for each object: file, class, score, left, top, right, bottom in pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ddetr_cli import DdetrError, Detector, draw


def main() -> int:
    """Read the command line, find, print and draw; 1 where a picture could not be read."""
    parser = argparse.ArgumentParser(description="Find objects in pictures.")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    parser.add_argument("--model", default="demo", help="file, run, preset or hub id (default demo)")
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score that counts (default 0.5)")
    parser.add_argument("--output", type=Path, help="folder for the pictures with boxes (default: none are drawn)")
    options = parser.parse_args()

    try:
        detector = Detector(options.model, threshold=options.threshold)
    except DdetrError as error:
        sys.exit(str(error))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for path in options.pictures:
        try:
            found = detector.detect(path)
        except DdetrError as error:
            print(error, file=sys.stderr)
            failed = 1
            continue
        for one in found:
            print(path, one.label, f"{one.score:.3f}", *(round(side) for side in one.box), sep="\t")
        if options.output is not None:
            draw(path, found).save(options.output / f"{path.stem}.png")
    return failed


if __name__ == "__main__":
    sys.exit(main())
