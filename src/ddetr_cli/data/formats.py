"""Which picture files are read and which are refused, by name and by first bytes, and how large they may be.

Light on purpose: the command line needs these facts before it imports torch or Pillow.
"""

from __future__ import annotations

# Pillow's own warning limit (1 GiB of memory for three bytes and some work space).
MAX_PIXELS = 89_478_485

ACCEPTED_TYPES = "JPEG, MPO, PNG, WebP, BMP, GIF, TIFF, JPEG 2000, PPM, AVIF, and HEIF with the plug-in pillow-heif"
# What a folder is searched for. A file named by the user is always tried: its content decides, not its name.
ACCEPTED_SUFFIXES = frozenset({
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".j2c", ".j2k", ".jfif", ".jp2",
    ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tif",
    ".tiff", ".webp",
})  # fmt: skip
# Pictures in formats that are not read. In a folder they are named as failed rather than passed over in silence.
REFUSED_SUFFIXES = frozenset({
    ".arw", ".blp", ".bw", ".cr2", ".cr3", ".cur", ".dcm", ".dcx", ".dds", ".dng", ".emf", ".eps", ".exr", ".fit",
    ".fits", ".flc", ".fli", ".fpx", ".ftc", ".fts", ".ftu", ".gbr", ".hdr", ".icb", ".icns", ".ico", ".iim", ".im",
    ".jxl", ".mic", ".msp", ".nef", ".orf", ".pcd", ".pcx", ".pdf", ".ps", ".psb", ".psd", ".pxr", ".qoi", ".raf",
    ".ras", ".rgb", ".rgba", ".rw2", ".sgi", ".spi", ".sun", ".svg", ".svgz", ".tga", ".vda", ".vst", ".wmf",
    ".xbm", ".xcf", ".xpm",
})  # fmt: skip
# First bytes of formats people try that are not on the list, so that the refusal can name them.
REFUSED_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"%!PS", "EPS or PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"SIMPLE  =", "FITS"),
    (b"8BPS", "Photoshop"),
    (b"DDS ", "DDS"),
    (b"BLP", "BLP"),
    (b"\x01\xda", "SGI"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"icns", "ICNS"),
    (b"\x0a\x05\x01", "PCX"),
    (b"PK\x03\x04", "ZIP archive"),
)
