"""Store the response of a first request before its outcome."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from wsgi_dbsession._start import body_length, close

from ._problem import in_progress
from ._row import Row, Taken
from ._rows import Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# These headers belong to one connection: RFC 9110, section 7.6.1.
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# A cookie may be a login. A replay has its own length and date.
_NOT_STORED = HOP_BY_HOP | {"content-length", "date", "set-cookie"}

# uWSGI's `wsgi.file_wrapper` is a C function, which returns the file that it was given.
_FILES = (io.BufferedReader, io.BufferedRandom, io.BytesIO, io.FileIO)


def respond(
    app: WSGIApplication, environ: WSGIEnvironment, recording: Recording
) -> Iterable[bytes]:
    """Call the application, and store its response."""
    file_wrapper = environ.get("wsgi.file_wrapper")  # the application may replace it
    result: Iterable[bytes] = ()
    try:
        result = app(environ, recording)
        return recording.record(result, file_wrapper)
    except BaseException as error:
        with contextlib.suppress(BaseException):  # the first error is the one to raise
            close(result)
        if isinstance(error, Taken):
            return in_progress().respond(recording, sys.exc_info())
        raise


class Recording:
    """The application's ``start_response``, which records the response.

    It passes everything on at once, because SessionMiddleware holds the start.

    :param start_response: the callable of SessionMiddleware.
    :param row: stores the response.
    :param max_response: the largest body, in bytes, that is stored.
    :param chosen: the names of the headers to store, in lower case; None for the default.
    """

    __slots__ = (
        "_blocks",
        "_chosen",
        "_headers",
        "_is_marked",
        "_is_stored",
        "_length",
        "_max_response",
        "_row",
        "_server",
        "_status",
        "_write",
        "failure",
    )

    def __init__(
        self,
        start_response: StartResponse,
        row: Row,
        max_response: int,
        chosen: frozenset[str] | None,
    ) -> None:
        self.failure: BaseException | None = None
        self._server = start_response
        self._row = row
        self._max_response = max_response
        self._chosen = chosen
        self._status: str | None = None
        self._headers: list[tuple[str, str]] = []
        self._blocks: list[bytes] = []  # cleared when they exceed max_response
        self._length = 0
        self._is_marked = False
        self._is_stored = False

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        if exc_info is None:
            self._write = self._server(status, headers)
        else:
            try:
                self._write = self._server(status, headers, exc_info)
            finally:
                exc_info = None  # a traceback that refers to this frame is a cycle
        self._status = status
        self._headers = headers
        return self.write

    def write(self, block: bytes, /) -> None:
        """Send a block at once, as the write callable of PEP 3333 does."""
        self._add(block)
        # If this block completes the body, the outcome follows.
        if self._length >= self._expected():
            self._store()
        else:
            self._mark()
        self._write(block)

    def record(self, result: Iterable[bytes], file_wrapper: Any) -> Iterable[bytes]:
        """Store the response that the application returned.

        :param file_wrapper: the server's ``wsgi.file_wrapper``, or None.
        :return: the iterable for the server.
        :raises Taken: if the key does not belong to this request any more.
        """
        if self.failure is not None:
            raise self.failure  # write() has raised it, and the application has caught it
        self.renew()
        kind = type(result)
        if kind is list or kind is tuple:
            if self._status is not None:  # otherwise SessionMiddleware refuses the response
                for block in result:
                    self._add(block)
                self._store()
            return result
        if self._status is not None and self._is_long() and _is_file(result, file_wrapper):
            self._mark()
            return result
        body = Body(self, result)
        is_ended = False
        if self._status is None:
            # A generator may call start_response as late as before its first block.
            is_ended = next(body.read_ahead(), None) is None
            if self._status is None:
                return body
        if is_ended:
            self._store()
        elif self._is_long():
            self._mark()
        else:
            self._read(body)
            self._store()
        return body

    def renew(self) -> None:
        """Store the response again if the application has rolled back what was stored.

        Call it whenever application code has run, before the outcome.

        :raises Taken: if the key does not belong to this request any more.
        """
        if self._is_marked or self._is_stored:
            self._run(self._row.renew)

    def _expected(self) -> float:
        assert self._status is not None
        return body_length(False, self._status, self._headers)

    def _is_long(self) -> bool:
        """Return whether the body exceeds max_response, or its length is unknown."""
        return self._expected() > self._max_response

    def _read(self, body: Body) -> None:
        """Read blocks until the body is complete."""
        expected = self._expected()
        for block in body.read_ahead():
            self._add(block)
            if self._length >= expected:
                break

    def _add(self, block: bytes) -> None:
        self._length += len(block)
        if self._length <= self._max_response:
            self._blocks.append(block)
        else:
            self._blocks.clear()

    def _mark(self) -> None:
        """Store status and headers without the body: a replay reports that it is missing."""
        if not self._is_marked:
            self._is_marked = True
            self._save(None)

    def _store(self) -> None:
        """Store the response, whose body is complete."""
        if self._is_stored:
            return
        self._is_stored = True
        # A body that contradicts its Content-Length is broken, but its replay would look sound.
        is_sound = self._expected() in (self._length, math.inf)
        is_kept = is_sound and self._length <= self._max_response
        self._save(b"".join(self._blocks) if is_kept else None)

    def _save(self, body: bytes | None) -> None:
        assert self._status is not None
        headers = [(name, value) for name, value in self._headers if self._is_chosen(name.lower())]
        self._run(self._row.store, Stored(self._status, headers, body))

    def _run(self, write: Callable[..., None], *arguments: Stored) -> None:
        assert self._status is not None
        try:
            write(*arguments)
        except SQLAlchemyError as error:
            # An error page often follows an error that has aborted the transaction.
            if self._status[:1] not in "45":
                self.failure = error
                raise

    def _is_chosen(self, name: str) -> bool:
        return name not in _NOT_STORED if self._chosen is None else name in self._chosen


class Body:
    """The body: the server iterates over it if application code is left to run."""

    __slots__ = ("_ahead", "_blocks", "_iterable", "_recording")

    def __init__(self, recording: Recording, iterable: Iterable[bytes]) -> None:
        self._recording = recording
        self._iterable = iterable
        self._blocks = iter(iterable)
        self._ahead: deque[bytes] = deque()

    def read_ahead(self) -> Iterator[bytes]:
        """Yield the blocks from the first one on, and keep them for the server."""
        yield from tuple(self._ahead)
        for block in self._blocks:
            self._ahead.append(block)
            yield block

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._ahead:
            return self._ahead.popleft()
        try:
            block = next(self._blocks)
        except StopIteration:
            self._recording.renew()
            raise
        self._recording.renew()
        return block

    def close(self) -> None:
        """Close the application's iterable."""
        close(self._iterable)
        self._recording.renew()


def _is_file(result: Iterable[bytes], file_wrapper: Any) -> bool:
    """Return whether the server sends a file, so that no application code is left to run."""
    if file_wrapper is None:
        return False
    try:
        return isinstance(result, file_wrapper)
    except TypeError:  # PEP 3333 asks for a callable, not for a class
        return type(result) in _FILES
