"""Image files as RGB pictures: any accepted file, upright.

Reading is defensive: the content, not the name, decides the format; sizes are checked in the header before a
pixel is decoded; only Pillow's own decoders run, never an outside program (Ghostscript); whatever goes wrong
becomes one ``ImageError`` with one sentence. Transparency is dropped by a plain RGB conversion, as the authors'
code does it: nothing is composited on a background.
"""

from __future__ import annotations

import logging
import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, Jpeg2KImagePlugin, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin
from PIL.Image import core as pillow  # type: ignore[attr-defined] # its memory is managed there alone

from ddetr_cli.data.formats import ACCEPTED_TYPES, MAX_PIXELS, REFUSED_SIGNATURES
from ddetr_cli.data.truncated import truncated_allowed
from ddetr_cli.errors import ImageError, UsageError

# A file, a picture of Pillow's, or the (H,W,3) RGB values of one.
ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

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

# A reduced JPEG is still larger than what the model sees. Of photographs of 3000 px, seen at 800, half is enough: the
# logits of r50 move by up to 0.0009 of the largest, with bf16 by 0.003. At a margin of 1.5 scores of the demo model
# moved twice as far.
_DRAFT_MARGIN = 1.75

# Blocks of 16 MB that Pillow keeps of pictures that are gone: what two photographs of 12 megapixels take.
_KEPT_BLOCKS = 6

_log = logging.getLogger(__name__)


class Picture(NamedTuple):
    """An 8-bit RGB picture without metadata, the (width, height) of the whole, and whether its end is made up.

    ``whole`` has all of its pixels, where ``image`` is reduced and they were asked for too.
    """

    image: Image.Image
    size_wh: tuple[int, int]
    is_truncated: bool = False
    whole: Image.Image | None = None


def read_image(path: str | os.PathLike[str], *, upright: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of an image file as an 8-bit RGB picture without any metadata.

    ``upright`` turns it as its EXIF (or XMP) orientation says; a damaged or invalid orientation counts as none.
    (TIFF is upright either way: Pillow turns it while loading.)
    16-bit grey is divided by 257; 32-bit integers and floats are scaled as ``_to_8_bit`` documents. Raises
    ImageError for everything else: not a regular file, not an accepted format, damaged, truncated, or more than
    ``max_pixels`` (Pillow itself refuses above 178,956,970). Notes on the file go to the log at INFO.
    """
    return read_picture(path, upright=upright, max_pixels=max_pixels).image


def read_picture(
    path: str | os.PathLike[str],
    *,
    opener: Callable[[], BinaryIO] | None = None,
    upright: bool = True,
    short: int | None = None,
    keeps_whole: bool = False,
    max_pixels: int = MAX_PIXELS,
    allow_truncated: bool = False,
) -> Picture:
    """As ``read_image``, with ``short`` perhaps reduced; with ``keeps_whole`` all pixels come as well then.

    ``short`` is the short side of the network size. What comes of a JPEG has 1.75 times that or more: the decoder
    reduces while decoding, which takes a fraction of the time. Resized to it, it differs from the whole picture
    resized by less than one level of 255 on average. A size that is no multiple of the reduction is not reduced so
    far: a part of a pixel at its end would move every box.

    ``opener`` gives the file where ``path`` is only its name. With ``allow_truncated`` a file that breaks off is read
    as far as it goes, and the rest is whatever its decoder makes of it.
    """
    # Pillow warns about odd metadata; under -W error these would turn readable photos into failures.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with _open_regular(path) if opener is None else opener() as file:
            head = file.read(512)

            def decode(least: int | None) -> tuple[Image.Image, tuple[int, int]]:
                file.seek(0)
                return _decode(path, file, head, upright=upright, max_pixels=max_pixels, short=least)

            def read(*, is_truncated: bool) -> Picture:
                image, size_wh = decode(None if short is None else math.ceil(_DRAFT_MARGIN * short))
                whole = decode(None)[0] if keeps_whole and image.size != size_wh else None
                return Picture(image, size_wh, is_truncated, whole)

            try:
                return read(is_truncated=False)
            except Exception as error:
                if not allow_truncated or "truncated" not in str(error).lower():
                    raise
            with truncated_allowed():
                return read(is_truncated=True)
    except ImageError:
        raise
    # Damaged files surface as OSError, ValueError, TypeError, SyntaxError, struct.error, MemoryError and more.
    except Exception as error:
        raise ImageError(f"{path}: {_reason(error)}") from error


def read_size(path: str | os.PathLike[str]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) as stored, and as ``read_image`` turns it upright, from the header: no pixel is decoded.

    Raises ImageError for what the header alone shows to be unreadable.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with _open_regular(path) as file:
            head = file.read(512)
            file.seek(0)
            with _open_image(path, file, head) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(_too_large(path, width * height, MAX_PIXELS))
                # Pillow would decode a PNG to see whether its orientation stands behind the pixels.
                orientation = _orientation(path, image) if image.format != "PNG" or "exif" in image.info else 1
        return (width, height), ((height, width) if orientation in (5, 6, 7, 8) else (width, height))
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{path}: {_reason(error)}") from error


@contextmanager
def picture_memory_kept() -> Iterator[None]:
    """Inside, pictures take the memory of those before them.

    Fresh memory costs a page fault for every 4 KiB: of 12 megapixels, a fifth of the time that decoding takes.
    """
    before = pillow.get_blocks_max()
    pillow.set_blocks_max(max(before, _KEPT_BLOCKS))
    try:
        yield
    finally:
        pillow.set_blocks_max(before)


def open_picture(image: ImageLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """What a program calls a picture, as RGB: a file as ``read_image`` gives it, a picture in memory as it is.

    Raises ImageError for a picture that cannot be decoded, UsageError for what is none.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or "picture"
        if min(image.size) < 1:
            raise ImageError(f"{name}: empty image ({image.width}x{image.height} px). Give one with pixels.")
        try:
            return as_rgb(image)
        except Exception as error:  # Pillow decodes a file only now, and damage has many names
            raise ImageError(f"{name}: {_reason(error)}") from error
    if not isinstance(image, np.ndarray):
        raise UsageError(
            f"{type(image).__name__}: not a picture. Give a path, a Pillow picture or an array (H,W,3) of uint8."
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UsageError(
            f"array of shape {image.shape} and type {image.dtype}: not a picture. Give (H,W,3) of uint8 in RGB order."
        )
    return Image.fromarray(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, transparency dropped; it may share its pixels with ``image``."""
    image.load()
    # Pillow's convert would copy an RGB picture: of 12 megapixels, in a third of the time that decoding takes.
    return image._new(image.im) if image.mode == "RGB" else _to_8_bit(image).convert("RGB")


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
    path: str | os.PathLike[str],
    file: BinaryIO,
    head: bytes,
    *,
    upright: bool,
    max_pixels: int,
    short: int | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """The RGB picture, whole or of a short side of at least ``short``, and the (width, height) of the whole."""
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
        whole = image.size
        if short is not None:
            _reduce(image, short)
        image.load()
        # After load: some formats read the orientation behind the pixels, and some plug-ins turn while loading.
        orientation = _orientation(path, image) if upright else 1
        rgb = as_rgb(image)
        if orientation in _TURNS:
            rgb = rgb.transpose(_TURNS[orientation])
            whole = whole if orientation < 5 else (whole[1], whole[0])
        rgb.info = {}
        if _log.isEnabledFor(logging.INFO) and _has_more_frames(image):
            _log.info("%s: several frames or pages; only the first is used", path)
    return rgb, whole


def _reduce(image: Image.Image, short: int) -> None:
    """Have a JPEG decoded at an eighth, quarter or half, if that leaves a short side of ``short`` or more."""
    for factor in (8, 4, 2):
        if min(image.size) >= factor * short and not any(side % factor for side in image.size):
            image.draft(None, (image.width // factor, image.height // factor))  # other formats do nothing
            return


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
