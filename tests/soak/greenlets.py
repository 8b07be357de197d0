"""A middleware that times requests out, as one does where greenlets serve them."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import gevent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class TimedOut(Exception):  # noqa: N818 - like gevent.Timeout
    """What a request is timed out with, where it has to be an ``Exception``."""


class Impatient:
    """Raises an error into the request, after the seconds that its client names.

    :param interrupts: whether half of them are a ``gevent.Timeout``, which is no ``Exception``.
    """

    def __init__(self, app: WSGIApplication, *, interrupts: bool) -> None:
        self.app = app
        self.interrupts = interrupts

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seconds = environ.get("HTTP_X_PATIENCE")
        if seconds is None:
            return self.app(environ, start_response)
        bare = self.interrupts and zlib.crc32(environ["PATH_INFO"].encode("latin-1")) % 2
        timer = gevent.Timeout.start_new(float(seconds), None if bare else TimedOut)
        try:
            body = self.app(environ, start_response)
        except BaseException:
            timer.close()
            raise
        if isinstance(body, list):
            timer.close()
            return body
        return Timed(body, timer)


class Timed:
    """A body that is timed out, until it is closed."""

    def __init__(self, body: Iterable[bytes], timer: Any) -> None:
        self.body = body
        self.timer = timer

    def __iter__(self) -> Iterator[bytes]:
        yield from self.body

    def close(self) -> None:
        """Stop the timer, and close the body."""
        self.timer.close()
        close: Any = getattr(self.body, "close", None)
        if close is not None:
            close()
