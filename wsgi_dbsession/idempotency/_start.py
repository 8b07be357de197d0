"""PEP 3333: the length of a body, and a body that was read ahead."""

from __future__ import annotations

import math
import re
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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


class Rest:
    """An iterable of which some blocks were read ahead."""

    __slots__ = ("_ahead", "_blocks", "_iterable")

    def __init__(self, iterable: Iterable[bytes]) -> None:
        self._iterable = iterable
        self._blocks = iter(iterable)
        self._ahead: deque[bytes] = deque()

    def read_ahead(self) -> Iterator[bytes]:
        """Return the blocks from the first one; what is read is kept for the server."""
        yield from tuple(self._ahead)
        for block in self._blocks:
            self._ahead.append(block)
            yield block

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return self._ahead.popleft() if self._ahead else next(self._blocks)

    def close(self) -> None:
        """Close the application's iterable."""
        close(self._iterable)
