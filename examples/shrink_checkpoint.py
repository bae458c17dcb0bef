#!/usr/bin/env python3
"""Store a model as float16, at half the size: shrink_checkpoint.py MODEL OUT.safetensors

MODEL is anything ``--model`` takes. ddetr reads the result like any checkpoint, back into float32. The packaged demo
model was stored this way.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ddetr_cli.errors import DdetrError
from ddetr_cli.weights import load_model, save_checkpoint


def main() -> int:
    """Read, store, say the sizes."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        loaded = load_model(sys.argv[1])
        save_checkpoint(Path(sys.argv[2]), loaded.model, loaded.classes, half=True)
    except DdetrError as error:
        print(f"shrink_checkpoint: {error}", file=sys.stderr)
        return error.exit_code
    before, after = loaded.source.stat().st_size, Path(sys.argv[2]).stat().st_size
    print(f"{loaded.source}: {before / 1e6:.1f} MB -> {sys.argv[2]}: {after / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
