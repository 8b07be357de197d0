"""PEP 3333: the length of a body, and what kinds of iterables there are."""

from __future__ import annotations

import io
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

# What uWSGI's `wsgi.file_wrapper`, a C function, returns: the file that it was given.
_FILES = (io.BufferedReader, io.BufferedRandom, io.BytesIO, io.FileIO)

_NUMBER = re.compile("[0-9]+")


def is_bodiless(status: str) -> bool:
    """Return whether a response with this status has no body: RFC 9110, section 6.4.1."""
    return status[:1] == "1" or status[:3] in ("204", "304")


def body_length(status: str, headers: list[tuple[str, str]]) -> float:
    """Return the number of bytes that make the body whole, infinite if it is unknown."""
    if is_bodiless(status):
        return 0
    lengths = [value for name, value in headers if name.lower() == "content-length"]
    return min(map(int, _NUMBER.findall(",".join(lengths))), default=math.inf)


def close(iterable: Iterable[bytes]) -> None:
    """Close a response's iterable."""
    method = getattr(iterable, "close", None)
    if method is not None:
        method()


def is_file(result: Iterable[bytes], file_wrapper: Any) -> bool:
    """Return whether the server is to send a file: no code of the application is left to run.

    :param file_wrapper: the ``wsgi.file_wrapper`` of the environ.
    """
    if file_wrapper is None:
        return False
    try:
        return isinstance(result, file_wrapper)
    except TypeError:  # PEP 3333 asks for a callable, not for a class
        return type(result) in _FILES
