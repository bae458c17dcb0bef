"""Image files to the model's input: reading any accepted file as RGB, the network size, pixels, padding.

# B batch, H and W network size in pixels, h and w of one image

Reading is defensive: the content, not the name, decides the format; sizes are checked in the header before a
pixel is decoded; only Pillow's own decoders run, never an outside program (Ghostscript); whatever goes wrong
becomes one ``ImageError`` with one sentence. Transparency is dropped by a plain RGB conversion, as the authors'
code does it: nothing is composited on a background.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import AvifImagePlugin, Image, Jpeg2KImagePlugin, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin
from torch import Tensor

from ddetr_cli.data.formats import ACCEPTED_TYPES, MAX_PIXELS, REFUSED_SIGNATURES
from ddetr_cli.errors import ImageError

# ImageNet statistics, RGB, for values in [0,1]. Source: the authors' transforms.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# MPO is opened through JPEG. Naming the plug-ins above registers them, so that Pillow never loads all the others.
_PLUGINS = (AvifImagePlugin, Jpeg2KImagePlugin, TiffImagePlugin, WebPImagePlugin)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM", "AVIF")
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_ORIENTATION_TAG = 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_log = logging.getLogger(__name__)


def read_image(path: str | os.PathLike[str], *, upright: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of an image file as an 8-bit RGB picture without any metadata.

    ``upright`` turns it as its EXIF (or XMP) orientation says; a damaged or invalid orientation counts as none.
    (TIFF is upright either way: Pillow turns it while loading.)
    16-bit grey is divided by 257; 32-bit integers and floats are scaled as ``_to_8_bit`` documents. Raises
    ImageError for everything else: not a regular file, not an accepted format, damaged, truncated, or more than
    ``max_pixels`` (Pillow itself refuses above 178,956,970). Notes on the file go to the log at INFO.
    """
    # Pillow warns about odd metadata; under -W error these would turn readable photos into failures.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with _open_regular(path) as file:
            head = file.read(512)
            file.seek(0)
            return _decode(path, file, head, upright=upright, max_pixels=max_pixels)
    except ImageError:
        raise
    # Damaged files surface as OSError, ValueError, TypeError, SyntaxError, struct.error, MemoryError and more.
    except Exception as error:
        raise ImageError(f"{path}: {_reason(error)}") from error


def network_size(
    width: int,
    height: int,
    short: int,
    *,
    cap: int | None = None,
    rule: Literal["original", "hf"] = "original",
) -> tuple[int, int]:
    """(h, w) the model sees of a ``width`` x ``height`` image: short side ``short``, long side about <= ``cap``.

    ``cap`` defaults to ``short`` * 1333 / 800, truncated. ``original`` is the authors' rule, whose long side can
    exceed the cap by a pixel or two because it follows from the rounded short side; ``hf`` is that of
    transformers, which takes the unrounded one. Both give at least 1 px; where that would leave the long side
    unbounded (an aspect ratio beyond twice the cap) it is the cap.
    """
    if min(width, height, short) < 1:
        raise ValueError(f"an image of {width}x{height} px at short side {short} has no size")
    cap = short * 1333 // 800 if cap is None else cap
    small, large = min(width, height), max(width, height)
    exact = float(short)
    target = short
    if large / small * short > cap:
        exact = cap * small / large
        target = round(exact)
    if target < 1:
        sides = (1, cap)
    elif small == target:
        sides = (small, large)
    else:
        sides = (target, max(1, int((target if rule == "original" else exact) * large / small)))
    return sides if height <= width else (sides[1], sides[0])


def to_pixels(image: Image.Image, size_hw: tuple[int, int]) -> Tensor:
    """Normalised float32 (3,h,w) of an RGB picture, resized by Pillow's antialiased bilinear filter."""
    h, w = size_hw
    resized = image.resize((w, h), Image.Resampling.BILINEAR)
    # np.array, not asarray: torch wants memory it may write to.
    channels_last = torch.from_numpy(np.array(resized))
    pixels = channels_last.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    # The order of these three roundings is the authors'; folding them into one multiplication changes last bits.
    return pixels.div_(255).sub_(mean).div_(std)


def pad_batch(images: Sequence[Tensor], *, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Pixels (B,3,H,W) of images (3,h,w), zero at the bottom and right, and is_padding (B,H,W), True there.

    H and W are the largest h and w, rounded up to a multiple of ``multiple``.
    """
    if not images:
        raise ValueError("a batch needs at least one image")
    height, width = (-(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2))
    pixels = images[0].new_zeros((len(images), 3, height, width))
    is_padding = torch.ones((len(images), height, width), dtype=torch.bool, device=pixels.device)
    for index, image in enumerate(images):
        h, w = image.shape[1:]
        pixels[index, :, :h, :w] = image
        is_padding[index, :h, :w] = False
    return pixels, is_padding


def _open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The file opened for reading. Raises ImageError for folders, pipes, devices; never waits for a writer."""
    # O_NONBLOCK: opening a pipe would otherwise block until somebody writes to it. Absent on Windows.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ImageError(f"{path}: not a regular file (a folder, pipe, socket or device). Give an image file.")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _decode(
    path: str | os.PathLike[str], file: BinaryIO, head: bytes, *, upright: bool, max_pixels: int
) -> Image.Image:
    try:
        image = _open_image(path, file, head)
    except Image.DecompressionBombError as error:
        found = re.search(r"(\d+) pixels", str(error))
        raise ImageError(_too_large(path, int(found[1]) if found else max_pixels, max_pixels)) from error
    with image:
        if image.width * image.height > max_pixels:
            raise ImageError(_too_large(path, image.width * image.height, max_pixels))
        if min(image.size) < 1:
            raise ImageError(f"{path}: empty image ({image.width}x{image.height} px). Export it again.")
        image.load()
        # After load: some formats read the orientation behind the pixels, and some plug-ins turn while loading.
        orientation = _orientation(path, image) if upright else 1
        rgb = _to_8_bit(image).convert("RGB")
        if orientation in _TURNS:
            rgb = rgb.transpose(_TURNS[orientation])
        rgb.info = {}
        if _log.isEnabledFor(logging.INFO) and _has_more_frames(image):
            _log.info("%s: several frames or pages; only the first is used", path)
    return rgb


def _open_image(path: str | os.PathLike[str], file: BinaryIO, head: bytes) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:
        if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
            return _open_heif(path, file)
        raise ImageError(f"{path}: {_not_accepted(path, head)}") from error


def _open_heif(path: str | os.PathLike[str], file: BinaryIO) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError(f"{path}: HEIF image (no plug-in for it). Run pip install pillow-heif.") from error
    pillow_heif.register_heif_opener()
    file.seek(0)
    return Image.open(file, formats=("HEIF",))


def _not_accepted(path: str | os.PathLike[str], head: bytes) -> str:
    """Why content that no accepted decoder takes is refused, as specific as its first bytes allow."""
    if not head:
        return "not an image (the file is empty). Copy or download it again."
    if head.startswith(b"version https://git-lfs"):
        return "not an image (it is a Git LFS pointer). Run git lfs pull to fetch the real file."
    for signature, name in REFUSED_SIGNATURES:
        if head.startswith(signature):
            return f"format not accepted ({name}). Convert it to one of {ACCEPTED_TYPES}."
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return f"format not accepted (SVG). Convert it to one of {ACCEPTED_TYPES}."
    if text.startswith((b"<html", b"<!doctype html")):
        return "not an image (it is an HTML page, perhaps a failed download). Download it again."
    if head[4:6] in (b"\x11\xaf", b"\x12\xaf"):
        return f"format not accepted (FLI). Convert it to one of {ACCEPTED_TYPES}."
    if head.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"\xff\x4f\xff\x51")):
        return "damaged image (its header cannot be read). Copy or export it again."
    if Path(path).suffix.lower() == ".tga":
        return f"format not accepted (TGA). Convert it to one of {ACCEPTED_TYPES}."
    return f"not an image (format not accepted: no known signature). Give one of {ACCEPTED_TYPES}."


def _orientation(path: str | os.PathLike[str], image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where it is absent, invalid or the EXIF block is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF raises SyntaxError among others, and the pixels are fine all the same
        _log.info("%s: damaged EXIF block; taken as upright", path)
        return 1
    if isinstance(value, int) and 1 <= value <= 8:
        return value
    _log.info("%s: invalid EXIF orientation %r; taken as upright", path, value)
    return 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits scaled to 8; any other image unchanged (Pillow itself clips: white pictures).

    16 bits: divided by 257, so that 65535 is 255. 32-bit integers and floats carry no scale, so it follows from
    the values: within 0..1 (floats) times 255, within 0..255 as they are, within 0..65535 divided by 257,
    anything else from its own minimum and maximum to 0..255. Values that are not finite become black.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / np.float32(257)).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image).astype(np.float64)
    is_finite = np.isfinite(values)
    values = np.where(is_finite, values, 0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1 and image.mode == "F":
        values *= 255
    elif low >= 0 and 255 < high <= 65535:
        values /= 257
    elif low < 0 or high > 255:
        # Halved first: the range of two huge floats of opposite sign overflows. A constant picture becomes black.
        half_range = high / 2 - low / 2
        values = np.where(is_finite, (values / 2 - low / 2) / (half_range or 1.0) * 255, 0.0)
    return Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # the directory of a damaged file's later frames; the first has been read
        return False


def _too_large(path: str | os.PathLike[str], pixels: int, limit: int) -> str:
    return f"{path}: {pixels / 1e6:.0f} Mpx exceeds the limit of {limit / 1e6:.0f} Mpx. Give a smaller version."


def _reason(error: Exception) -> str:
    """One sentence for whatever the chain of opening, loading and converting raised."""
    if isinstance(error, FileNotFoundError):
        return "no such file. Check the path."
    if isinstance(error, PermissionError):
        return "permission denied. Make the file readable."
    if isinstance(error, MemoryError):
        return "not enough memory to decode it. Give a smaller version."
    why = " ".join(str(error).split()) or type(error).__name__
    if "truncated" in why.lower():
        return f"truncated image ({why}). Copy or download it again."
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror or why}). Check the file and its disk."
    return f"damaged image ({why}). Copy or export it again."
