"""The fast path of inference on a CPU: the same numbers as the model's own forward, from the model's own weights.

``accelerate`` derives it from a ``DeformableDetr``: batch-norms folded, weights packed once, buffers kept between
images. It is no second definition of the model: what does not repeat for every pixel is computed by the model's
modules themselves.
"""

from __future__ import annotations

from ddetr_cli.inference.fast.detector import FastDetector, accelerate, best_precision

__all__ = ["FastDetector", "accelerate", "best_precision"]
