from __future__ import annotations

from PIL import Image

from ddetr_cli.data.formats import ACCEPTED_SUFFIXES, REFUSED_SUFFIXES

READ = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "AVIF"}
# Pillow knows these too, but a folder of data, films or weather maps is not a folder of pictures.
NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM"}


def test_every_ending_of_a_format_that_is_read_is_searched_for() -> None:
    extensions = Image.registered_extensions()
    assert {suffix for suffix, kind in extensions.items() if kind in READ} <= ACCEPTED_SUFFIXES


def test_every_other_picture_that_pillow_knows_is_refused_by_name() -> None:
    extensions = Image.registered_extensions()
    others = {suffix for suffix, kind in extensions.items() if kind not in READ | NO_PICTURES | {"HEIF"}}
    assert others <= REFUSED_SUFFIXES


def test_no_ending_is_both_read_and_refused() -> None:
    assert not ACCEPTED_SUFFIXES & REFUSED_SUFFIXES
