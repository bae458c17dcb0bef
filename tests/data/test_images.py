from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr_cli.data.images import open_picture, picture_memory_kept, read_image, read_picture
from ddetr_cli.data.pixels import STD, network_size, to_pixels
from ddetr_cli.errors import ImageError, UsageError

ORIENTATION = 274
ACCEPTED_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM", "AVIF"}


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_of_claimed_size(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def refusal(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_lossless_picture_is_read_to_the_last_bit(tmp_path: Path, photo: Image.Image, image_format: str) -> None:
    file = tmp_path / "picture"
    file.write_bytes(encoded(photo, image_format))
    image = read_image(file)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(photo))


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "JPEG2000", "AVIF", "GIF"])
def test_the_content_decides_the_format_not_the_name(tmp_path: Path, photo: Image.Image, image_format: str) -> None:
    file = tmp_path / "wrong.bmp"
    file.write_bytes(encoded(photo, image_format))
    difference = np.abs(np.asarray(read_image(file), dtype=int) - np.asarray(photo, dtype=int))
    assert difference.mean() < 8  # lossy codecs and GIF's 256 colours


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "CMYK", "P"])
def test_other_colour_modes_become_the_rgb_picture_pillow_makes_of_them(
    tmp_path: Path, photo: Image.Image, mode: str
) -> None:
    file = tmp_path / "picture.tif"
    file.write_bytes(encoded(photo.convert(mode), "TIFF"))
    assert np.array_equal(np.asarray(read_image(file)), np.asarray(photo.convert(mode).convert("RGB")))


def test_transparent_pixels_keep_their_colour(tmp_path: Path, photo: Image.Image) -> None:
    file = tmp_path / "transparent.png"
    see_through = photo.copy()
    see_through.putalpha(0)
    see_through.save(file)
    assert np.array_equal(np.asarray(read_image(file)), np.asarray(photo))


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_8_bits_and_not_clipped_to_white(
    tmp_path: Path, photo: Image.Image, image_format: str
) -> None:
    grey = np.asarray(photo.convert("L"))
    file = tmp_path / "grey16"
    file.write_bytes(encoded(Image.fromarray(grey.astype(np.uint16) * 257), image_format))
    assert np.array_equal(np.asarray(read_image(file))[..., 0], grey)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),  # a fraction
        ([0.0, 100.0, 255.0], [0, 100, 255]),  # already 8 bits
        ([0.0, 25700.0, 65535.0], [0, 100, 255]),  # 16 bits
        ([-1.0, 0.0, 1.0], [0, 128, 255]),  # no known scale: minimum to maximum
        ([0.0, float("nan"), 255.0], [0, 0, 255]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),  # a range that overflows a float32
        ([1e6, 1e6, 1e6], [0, 0, 0]),
    ],
)
def test_float_pictures_are_scaled_by_the_range_of_their_values(
    tmp_path: Path, values: list[float], expected: list[int]
) -> None:
    file = tmp_path / "float.tif"
    Image.fromarray(np.array([values], dtype=np.float32)).save(file)
    assert np.asarray(read_image(file))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("values", "expected"), [([0, 100, 255], [0, 100, 255]), ([0, 25700, 65535], [0, 100, 255])])
def test_32_bit_integers_are_taken_as_8_or_16_bits_where_they_fit(
    tmp_path: Path, values: list[int], expected: list[int]
) -> None:
    file = tmp_path / "int.tif"
    Image.fromarray(np.array([values], dtype=np.int32)).save(file)
    assert np.asarray(read_image(file))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_turned_photo_comes_upright(tmp_path: Path, photo: Image.Image, orientation: int) -> None:
    turns_back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored so that the viewer's quarter turn clockwise restores it
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turn = turns_back[orientation]
    stored = photo if turn is None else photo.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = tmp_path / "turned.png"
    stored.save(file, exif=exif)
    assert np.array_equal(np.asarray(read_image(file)), np.asarray(photo))
    assert np.array_equal(np.asarray(read_image(file, upright=False)), np.asarray(stored))


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_invalid_orientation_counts_as_none_and_is_noted(
    tmp_path: Path, photo: Image.Image, orientation: int, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = tmp_path / "odd.png"
    photo.save(file, exif=exif)
    with caplog.at_level(logging.INFO):
        assert np.array_equal(np.asarray(read_image(file)), np.asarray(photo))
    assert "invalid EXIF orientation" in caplog.text


def test_a_damaged_exif_block_does_not_cost_the_photo(tmp_path: Path, photo: Image.Image) -> None:
    jpeg = encoded(photo, "JPEG", quality=95)
    block = b"Exif\0\0" + b"\xff" * 32
    file = tmp_path / "garbage.jpg"
    file.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:])
    assert read_image(file).size == photo.size


def test_a_broken_colour_profile_does_not_cost_the_photo(tmp_path: Path, photo: Image.Image) -> None:
    file = tmp_path / "profile.jpg"
    file.write_bytes(encoded(photo, "JPEG", icc_profile=b"not a profile" * 10))
    assert read_image(file).size == photo.size


def test_no_metadata_is_carried_along(tmp_path: Path, photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    file = tmp_path / "photo.jpg"
    photo.save(file, exif=exif)
    image = read_image(file)
    assert image.info == {}
    assert not image.getexif()


def test_only_the_first_frame_is_used_and_that_is_noted(
    tmp_path: Path, photo: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "pages.tif"
    photo.save(file, save_all=True, append_images=[photo.rotate(180)])
    with caplog.at_level(logging.INFO):
        assert np.array_equal(np.asarray(read_image(file)), np.asarray(photo))
    assert "only the first is used" in caplog.text


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2000), (2000, 1), (6000, 40)])
def test_extreme_sizes_are_read_and_become_pixels(tmp_path: Path, photo: Image.Image, size: tuple[int, int]) -> None:
    file = tmp_path / "size.png"
    photo.resize(size).save(file)
    image = read_image(file)
    assert image.size == size
    size_hw = network_size(*size, 320)
    assert to_pixels(image, size_hw).shape == (3, *size_hw)
    assert min(size_hw) >= 1
    assert max(size_hw) <= 2 * 533


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"\xff", "not an image"),
        (bytes(50_000), "not an image"),
        (np.random.default_rng(0).bytes(20_000), "not an image"),
        ("überraschung\n".encode() * 50, "not an image"),
        (b"<html><body>404 Not Found</body></html>" * 20, "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", "git lfs pull"),
        (b"\xff\xd8\xff\xe0", "damaged image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "format not accepted (EPS"),
        (b"%PDF-1.7\n", "format not accepted (PDF)"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format not accepted (SVG)"),
        (b"<?xml version='1.0'?>\n<svg/>", "format not accepted (SVG)"),
        (b"SIMPLE  =                    T", "format not accepted (FITS)"),
        (b"8BPS\0\1", "format not accepted (Photoshop)"),
    ],
)
def test_what_is_no_accepted_image_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "named.jpg"
    file.write_bytes(content)
    assert expected in refusal(file)


def test_heif_without_its_plug_in_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    file = tmp_path / "photo.heic"
    file.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert "pip install pillow-heif" in refusal(file)


@pytest.mark.parametrize("percent", [10, 50, 90, 99])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_a_cut_file_is_refused_rather_than_completed(tmp_path: Path, image_format: str, percent: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), image_format)
    file = tmp_path / "cut"
    file.write_bytes(content[: len(content) * percent // 100])
    assert "truncated image" in refusal(file)


def test_a_jpeg_without_its_last_two_bytes_is_refused(tmp_path: Path, photo: Image.Image) -> None:
    file = tmp_path / "cut.jpg"
    file.write_bytes(encoded(photo, "JPEG")[:-2])
    assert "truncated image" in refusal(file)


def test_bytes_behind_the_end_are_ignored(tmp_path: Path, photo: Image.Image) -> None:
    file = tmp_path / "more.jpg"
    file.write_bytes(encoded(photo, "JPEG") + b"garbage" * 1000)
    assert read_image(file).size == photo.size


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_a_header_that_claims_too_many_pixels_is_refused_before_decoding(tmp_path: Path, side: int) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(png_of_claimed_size(side, side, bytes(100)))
    start = time.process_time()  # not the wall clock: the machine may be busy with something else
    assert f"{side * side // 1_000_000} Mpx exceeds the limit of 89 Mpx" in refusal(file)
    assert time.process_time() - start < 1


def test_the_limit_of_pixels_can_be_set(tmp_path: Path, photo: Image.Image) -> None:
    file = tmp_path / "photo.png"
    photo.save(file)
    assert read_image(file, max_pixels=64 * 48).size == (64, 48)
    with pytest.raises(ImageError, match="exceeds the limit"):
        read_image(file, max_pixels=64 * 48 - 1)


def test_a_pipe_a_folder_and_a_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path, Path("/dev/zero")):
        assert "not a regular file" in refusal(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "gone.jpg")


def test_pillows_warnings_never_turn_a_readable_photo_into_a_failure(tmp_path: Path, photo: Image.Image) -> None:
    file = tmp_path / "palette.png"
    photo.quantize(8).save(file, transparency=bytes(range(8)))
    code = "import sys; from ddetr_cli.data.images import read_image; print(read_image(sys.argv[1]).size)"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, str(file)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "(64, 48)", done.stderr


def test_a_large_jpeg_is_decoded_reduced_to_what_is_still_much_larger_than_the_model_sees(tmp_path: Path) -> None:
    file = tmp_path / "large.jpg"
    picture = Image.effect_mandelbrot((1608, 1208), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture.save(file, exif=exif)
    for short, expected in ((400, (1208, 1608)), (300, (604, 804)), (150, (302, 402)), (50, (151, 201))):
        image, whole, *_ = read_picture(file, short=short)
        assert (image.size, whole) == (expected, (1208, 1608))
        assert min(image.size) >= 1.75 * short


def test_a_jpeg_is_reduced_only_so_far_as_its_pixels_go_without_a_rest(tmp_path: Path) -> None:
    file = tmp_path / "large.jpg"
    for size, expected in (((1604, 1204), (401, 301)), ((1602, 1204), (801, 602)), ((1603, 1204), (1603, 1204))):
        Image.new("RGB", size).save(file)
        assert read_picture(file, short=50)[0].size == expected


def test_the_whole_picture_comes_beside_the_reduced_one_where_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "large.jpg"
    Image.effect_mandelbrot((1600, 1200), (-3, -2.5, 2, 2.5), 100).convert("RGB").save(file)
    both = read_picture(file, short=300, keeps_whole=True)
    assert both.image.size == (800, 600) and both.whole is not None
    assert np.array_equal(np.asarray(both.whole), np.asarray(read_image(file)))
    assert np.array_equal(np.asarray(both.image), np.asarray(read_picture(file, short=300)[0]))
    assert read_picture(file, short=800, keeps_whole=True).whole is None
    assert read_picture(file, short=300).whole is None


def test_memory_of_pictures_is_kept_for_the_next_ones_only_inside() -> None:
    before = Image.core.get_blocks_max()
    with picture_memory_kept():
        inside = Image.core.get_blocks_max()
    assert (inside, Image.core.get_blocks_max()) == (6, before)


def test_a_picture_that_is_small_or_no_jpeg_is_not_reduced(tmp_path: Path, photo: Image.Image) -> None:
    for name in ("photo.jpg", "photo.png"):
        photo.save(tmp_path / name)
        image, whole, *_ = read_picture(tmp_path / name, short=24 if name == "photo.png" else 40)
        assert image.size == whole == photo.size
        assert np.array_equal(np.asarray(image), np.asarray(read_image(tmp_path / name)))


def test_a_reduced_photo_looks_to_the_model_like_the_whole_one(data_dir: Path, tmp_path: Path) -> None:
    source = read_image(data_dir / "photos/images/000000039769.png").resize((2560, 1920), Image.Resampling.LANCZOS)
    file = tmp_path / "large.jpg"
    source.save(file, quality=92)
    size_hw = network_size(*source.size, 480)
    reduced = to_pixels(read_picture(file, short=480)[0], size_hw)
    difference = (reduced - to_pixels(read_image(file), size_hw)).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
    # Half a level on average; up to some levels at edges, where the two ways of averaging see different pixels.
    assert 0 < difference.mean() < 1
    assert difference.max() < 24


def test_a_reduced_reading_refuses_what_the_whole_one_refuses(tmp_path: Path, photo: Image.Image) -> None:
    file = tmp_path / "cut.jpg"
    file.write_bytes(encoded(photo.resize((1280, 960)), "JPEG")[:-2000])
    with pytest.raises(ImageError, match="truncated image"):
        read_picture(file, short=64)
    photo.save(file)
    with pytest.raises(ImageError, match="exceeds the limit"):
        read_picture(file, short=8, max_pixels=64 * 48 - 1)


def test_a_program_may_call_a_file_a_picture_or_an_array_a_picture(tmp_path: Path, photo: Image.Image) -> None:
    file = tmp_path / "photo.png"
    photo.save(file)
    for form in (file, str(file), photo, Image.open(file), np.asarray(photo), np.asarray(photo)[:, ::-1][:, ::-1]):
        assert np.array_equal(np.asarray(open_picture(form)), np.asarray(photo))


def test_pictures_of_other_modes_become_rgb(photo: Image.Image) -> None:
    assert np.array_equal(np.asarray(open_picture(photo.convert("L")))[..., 0], np.asarray(photo.convert("L")))
    see_through = photo.copy()
    see_through.putalpha(7)
    assert np.array_equal(np.asarray(open_picture(see_through)), np.asarray(photo))


@pytest.mark.parametrize(
    ("no_picture", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"array of shape \(4, 4\) and type uint8: not a picture"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros((4, 4, 3), np.float32), "type float32"),
        (torch.zeros(3, 4, 4), "Tensor: not a picture. Give a path"),
        (b"\xff\xd8", "bytes: not a picture"),
        (None, "NoneType: not a picture"),
    ],
)
def test_what_is_no_picture_at_all_is_a_wrong_call(no_picture: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_picture(no_picture)


def test_a_picture_in_memory_that_turns_out_damaged_or_empty_is_refused(tmp_path: Path, photo: Image.Image) -> None:
    file = tmp_path / "cut.jpg"
    file.write_bytes(encoded(photo, "JPEG")[:-100])
    with pytest.raises(ImageError, match=r"cut\.jpg: truncated image"):
        open_picture(Image.open(file))
    with pytest.raises(ImageError, match="picture: empty image"):
        open_picture(Image.new("RGB", (0, 5)))


def test_all_nine_orientation_photos_are_upright(data_dir: Path) -> None:
    sizes = {read_image(data_dir / f"photos/images/exif_landscape_{n}.jpg").size for n in range(9)}
    assert sizes == {(1800, 1200)}


def test_an_mpo_photo_of_a_drone_is_read(data_dir: Path) -> None:
    assert read_image(data_dir / "photos/images/drone_mpo.JPG").size == (4000, 2250)


def test_every_odd_file_is_read_or_refused_as_expected_fast_and_in_bounded_memory(data_dir: Path) -> None:
    folder = data_dir / "bad_images"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the tests that ran earlier in this process
    for name, facts in json.loads((folder / "expected.json").read_text())["files"].items():
        start = time.process_time()
        try:
            read_image(folder / name)
            result = "ok"
        except ImageError as error:
            result = "error" if str(error).startswith(f"{folder / name}: ") else f"error without its path: {error}"
        assert time.process_time() - start < 10, name
        is_accepted = facts.get("format", "unknown") in ACCEPTED_FORMATS
        assert result == (facts["result"] if is_accepted else "error"), name
    # Kilobytes on Linux.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 1024**2


def test_ghostscript_is_never_started(tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    canary, fake = tmp_path / "canary", tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch {canary}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    file = tmp_path / "named.jpg"
    file.write_bytes(encoded(photo, "EPS"))
    assert "format not accepted (EPS" in refusal(file)
    assert not canary.exists()


def test_no_file_stays_open_whatever_becomes_of_the_image(data_dir: Path) -> None:
    def read_all() -> int:
        for path in sorted((data_dir / "bad_images").iterdir()):
            with contextlib.suppress(ImageError):
                read_image(path)
        return len(list(Path("/proc/self/fd").iterdir()))

    assert read_all() == read_all()


def test_heif_is_read_where_its_plug_in_is_installed(tmp_path: Path, photo: Image.Image) -> None:
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    file = tmp_path / "photo.heic"
    import pillow_heif

    pillow_heif.from_pillow(photo).save(file)
    assert read_image(file).size == photo.size
