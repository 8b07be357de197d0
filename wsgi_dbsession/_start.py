"""PEP 3333: the held start of a response, closing an iterable, the length of a body."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeAlias

    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse

    Headers: TypeAlias = list[tuple[str, str]]

END: Any = object()
"""Stands for a block if none is left."""

_NUMBER = re.compile("[0-9]+")


def close(iterable: Iterable[bytes]) -> None:
    """Close a response's iterable, see "Specification Details" in PEP 3333."""
    method = getattr(iterable, "close", None)
    if method is not None:
        method()


def body_length(is_head: bool, status: str, headers: Headers) -> float:
    """Return the number of bytes that make the body whole, infinite if that is unknown.

    It is 0 where the headers alone are the whole response: HEAD, 1xx, 204, 304 (RFC 9110, section
    6.4.1). A Content-Length that is malformed or given twice counts with its smallest number, so
    that no client can take the body for whole before.
    """
    if is_head or status[:1] == "1" or status[:3] in ("204", "304"):
        return 0
    length = math.inf
    for name, value in headers:
        # The length first, because it is faster: streams have many headers.
        if len(name) == 14 and name.lower() == "content-length":
            for number in [value] if value.isdecimal() else _NUMBER.findall(value):
                length = min(length, int(number))
    return length


class HeldStart:
    """A ``start_response`` that keeps the response's start; a subclass knows until when.

    It does not refer to the body: a generator keeps its ``start_response``, and a reference back
    to the generator would keep an abandoned response alive until a collection.
    """

    __slots__ = ("_exc_info", "_server", "_write", "headers", "released", "status")

    # Set by the subclasses: an __init__() here would cost each request a call.
    status: str | None
    headers: Headers
    """The very list that the application gave: a header appended to it reaches the client."""

    released: bool
    _exc_info: OptExcInfo | None
    _server: StartResponse

    def _pass_on(self) -> None:
        """Pass the start to the server, see "The start_response() Callable" in PEP 3333."""
        assert self.status is not None
        self.released = True
        exc_info = self._exc_info
        if exc_info is None:
            self._write = self._server(self.status, self.headers)
            return
        self._exc_info = None
        try:
            self._write = self._server(self.status, self.headers, exc_info)
        finally:
            exc_info = None  # a traceback that refers to this frame is a cycle
