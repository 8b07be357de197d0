"""The request's body: what one attempt has read of it, the next one reads again."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

    from _typeshed.wsgi import InputStream

_IN_MEMORY = 1 << 16  # bytes


class Body:
    """A ``wsgi.input`` that can be rewound.

    Nothing is read ahead: an unread body stays where it is. The server's stream gets
    the calls as the application makes them, because some streams refuse other ones.
    """

    __slots__ = ("_ended", "_file", "_max_body", "_position", "_size", "_source")

    def __init__(self, source: InputStream, max_body: int) -> None:
        self._source = source
        self._max_body = max_body
        self._file: IO[bytes] | None = None
        self._size = 0
        self._position = 0
        self._ended = False

    def rewind(self) -> None:
        """Begin anew."""
        self._position = 0

    def is_lost(self) -> bool:
        """Return whether more was read than could be kept."""
        return self._size > self._max_body

    def read(self, *size: int | None) -> bytes:
        kept, rest = self._replay("read", size)
        return kept if rest == (0,) else kept + self._record(self._source.read, rest)

    def readline(self, *size: int | None) -> bytes:
        kept, rest = self._replay("readline", size)
        if rest == (0,) or kept[-1:] == b"\n":
            return kept
        return kept + self._record(self._source.readline, rest)

    def readlines(self, _: int | None = -1, /) -> list[bytes]:
        return list(self)  # PEP 3333: a server is free to ignore the hint

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def _replay(
        self, method: str, size: tuple[int | None, ...]
    ) -> tuple[bytes, tuple[int | None, ...]]:
        """Read again what an earlier attempt has read.

        :return: that, and the argument for what is left to read.
        """
        block = b""
        if self._file is not None and self._position < self._size:
            self._file.seek(self._position)
            block = getattr(self._file, method)(*size)
            self._position += len(block)
        if size and size[0] is not None and size[0] >= 0:
            size = (size[0] - len(block),)
        return block, size

    def _record(self, read: Callable[..., bytes], size: tuple[int | None, ...]) -> bytes:
        """Read on, and keep it."""
        if self._ended:
            return b""
        block = read(*size)
        self._size += len(block)
        self._position = self._size
        if not block:
            # Not asked again: on some servers that would wait for the next request.
            self._ended = True
        elif self.is_lost():
            self._drop()
        else:
            if self._file is None:
                self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - see __del__
            self._file.write(block)
        return block

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __del__(self) -> None:
        self._drop()
