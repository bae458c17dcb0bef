"""The one error tree: every failure a user can cause or meet, with the exit code it ends the program with.

A message is one sentence of the form ``<thing>: <what happened> (<why>). <what to do>``. Library code raises
these and never prints or exits; the command line catches ``DdetrError`` in one place. ``ValueError`` and
``assert`` stay reserved for programming mistakes.
"""

from __future__ import annotations


class DdetrError(Exception):
    """Base of all expected failures; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(DdetrError):
    """The command or a call was given something that cannot mean anything."""

    exit_code = 2


class ShapeError(UsageError):
    """Tensors whose shapes, dtypes or devices do not fit together."""


class ImageError(DdetrError):
    """One image that cannot be used; the run goes on without it."""

    exit_code = 3


class NothingUsableError(DdetrError):
    """No input was usable: none found, or every one failed."""

    exit_code = 4


class CheckpointError(DdetrError):
    """A model file that is absent, damaged, unsafe or of the wrong kind."""

    exit_code = 5


class DatasetError(DdetrError):
    """Annotations or a data set that cannot be trained or scored on."""

    exit_code = 6


class OutputError(DdetrError):
    """A result that cannot be written where it was asked for."""

    exit_code = 7


class DeviceError(DdetrError):
    """A device that is absent, out of memory, or without working kernels."""

    exit_code = 8


class KernelError(DeviceError):
    """The native library is missing where it is required, broken, or reported a failure."""


class DivergedError(DdetrError):
    """Training whose loss stayed non-finite."""

    exit_code = 9
