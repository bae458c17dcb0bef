"""Where the real images are, and a made photo for everything that can be tested without them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A smooth, colourful RGB picture of 64x48 px whose four corners differ."""
    y, x = np.mgrid[0:48, 0:64]
    channels = (40 + 3 * x, 30 + 4 * y, 200 - 2 * x - y)
    return Image.fromarray(np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8))
