from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from ddetr_cli.data.images import read_image, read_picture
from ddetr_cli.data.truncated import truncated_allowed
from ddetr_cli.errors import ImageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A JPEG of noise that breaks off in its middle."""
    values = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    return tmp_path / "cut.jpg"


def test_a_file_that_breaks_off_is_read_as_far_as_it_goes_only_where_that_is_allowed(cut: Path) -> None:
    with pytest.raises(ImageError, match="truncated image"):
        read_picture(cut)
    picture = read_picture(cut, allow_truncated=True)
    assert (picture.image.size, picture.is_truncated) == ((300, 200), True)
    whole = np.asarray(read_image(cut.with_name("whole.jpg")))
    assert (np.asarray(picture.image)[:80] == whole[:80]).all()
    assert not read_picture(cut.with_name("whole.jpg"), allow_truncated=True).is_truncated


def test_other_damage_is_refused_even_where_missing_ends_are_allowed(cut: Path) -> None:
    cut.write_bytes(b"no picture")
    with pytest.raises(ImageError, match="not an image"):
        read_picture(cut, allow_truncated=True)


def test_while_one_thread_allows_it_another_still_refuses(cut: Path) -> None:
    refused: list[str] = []

    def read() -> None:
        try:
            read_image(cut)
        except ImageError as error:
            refused.append(str(error))

    with truncated_allowed():
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert len(refused) == 1
    with pytest.raises(ImageError):
        read_image(cut)
