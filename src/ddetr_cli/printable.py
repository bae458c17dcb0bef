"""Text of unknown origin (file names, class names) made safe to show: it cannot steer a terminal or fake a line."""

from __future__ import annotations

import unicodedata

# Controls, lone surrogates (bytes of a name that is not UTF-8), line and paragraph separators. Of the format
# characters only those that reorder text: joiners belong to ordinary emoji and scripts.
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """``text`` on one line, every character that could act on a terminal written as an escape such as ``\\x1b``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escape(c) if unicodedata.category(c) in _UNSAFE_CATEGORIES or c in _REORDERING else c for c in text
    )


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that Python could not decode
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
