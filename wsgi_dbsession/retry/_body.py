"""The request's body, which each attempt can read from its first byte."""

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

    It does not read ahead, so the server can handle an unread body as usual. It passes a size to
    the server's stream only if the application does, because some streams refuse other calls.
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
        """Go back to the first byte, for the next attempt."""
        self._position = 0

    def is_lost(self) -> bool:
        """Return whether more than ``max_body`` bytes were read, which are not kept."""
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
        return list(self)  # PEP 3333 lets a server ignore the hint

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def _replay(
        self, method: str, size: tuple[int | None, ...]
    ) -> tuple[bytes, tuple[int | None, ...]]:
        """Read what an earlier attempt has already read.

        :return: these bytes, and the arguments for reading the rest from the server.
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
        """Read from the server, and keep the block for the next attempt."""
        if self._ended:
            return b""
        block = read(*size)
        self._size += len(block)
        self._position = self._size
        if not block:
            # Reading beyond the end would wait for the client's next request on some servers.
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
