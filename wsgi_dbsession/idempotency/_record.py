"""The response of a first request, stored before its outcome."""

from __future__ import annotations

import contextlib
import math
import sys
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from wsgi_dbsession._scope import current_scope

from ._problem import in_progress
from ._rows import Claim, Rows, Stored
from ._start import Rest, body_length, close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# They belong to one connection: RFC 9110, section 7.6.1.
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
# A cookie is a login. Length and date are those of the replay.
_NOT_STORED = HOP_BY_HOP | {"content-length", "date", "set-cookie"}


class Taken(Exception):  # noqa: N818 - it never leaves this package
    """The key belongs to another request, because the application rolled back this one's row."""


def respond(
    app: WSGIApplication, environ: WSGIEnvironment, recording: Recording
) -> Iterable[bytes]:
    """Call the application, and store its response."""
    result: Iterable[bytes] = ()
    try:
        result = app(environ, recording)
        return recording.record(result)
    except BaseException as error:
        with contextlib.suppress(BaseException):  # the first error is the one to raise
            close(result)
        recording.failure = None  # it refers to this frame
        if isinstance(error, Taken):
            return in_progress().respond(recording, sys.exc_info())
        raise


class Recording:
    """The ``start_response`` of the application, which records the response.

    It passes on everything at once: the SessionMiddleware around it holds the start back.

    :param start_response: that of the SessionMiddleware.
    :param rows: where to store the response.
    :param claim: the request's claim to its key.
    :param max_response: the largest body, in bytes, that is stored.
    :param chosen: the names of the headers to store, in lower case; None for the usual ones.
    """

    __slots__ = (
        "_blocks",
        "_chosen",
        "_claim",
        "_headers",
        "_is_marked",
        "_is_stored",
        "_length",
        "_max_response",
        "_rows",
        "_server",
        "_status",
        "_write",
        "failure",
    )

    def __init__(
        self,
        start_response: StartResponse,
        rows: Rows,
        claim: Claim,
        max_response: int,
        chosen: frozenset[str] | None,
    ) -> None:
        self.failure: BaseException | None = None
        self._server = start_response
        self._rows = rows
        self._claim = claim
        self._max_response = max_response
        self._chosen = chosen
        self._status: str | None = None
        self._headers: list[tuple[str, str]] = []
        self._blocks: list[bytes] = []  # empty once they are too many
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
        # The outcome may come with this block.
        if self._length >= self._expected():
            self._store()
        else:
            self._mark()
        self._write(block)

    def record(self, result: Iterable[bytes]) -> Iterable[bytes]:
        """Store the response that the application returned.

        :return: what the server is to get.
        :raises Taken: if the key does not belong to this request any more.
        """
        if self.failure is not None:
            raise self.failure  # the application caught it, out of write()
        kind = type(result)
        if kind is list or kind is tuple:
            if self._status is not None:  # or the SessionMiddleware refuses it
                for block in result:
                    self._add(block)
                self._store()
            return result
        rest: Rest | None = None
        is_ended = False
        if self._status is None:
            # A generator may start the response as late as with its first block.
            rest = Rest(result)
            is_ended = next(rest.read_ahead(), None) is None
            if self._status is None:
                return rest
        expected = self._expected()
        if is_ended or self._length >= expected:
            self._store()
        elif expected > self._max_response:
            self._mark()
        else:
            rest = rest or Rest(result)
            for block in rest.read_ahead():
                self._add(block)
                if self._length >= expected:
                    break
            self._store()
        return rest or result

    def _expected(self) -> float:
        assert self._status is not None
        return body_length(self._status, self._headers)

    def _add(self, block: bytes) -> None:
        self._length += len(block)
        if self._length <= self._max_response:
            self._blocks.append(block)
        else:
            self._blocks.clear()

    def _mark(self) -> None:
        """Store that the request is done, and that its response is not stored."""
        if not self._is_marked:
            self._is_marked = True
            self._save(None)

    def _store(self) -> None:
        """Store the response, of which the body is complete."""
        if self._is_stored:
            return
        self._is_stored = True
        # What is longer or shorter than it claims to be is cut, and so would its replay be.
        is_sound = self._expected() in (self._length, math.inf)
        is_kept = is_sound and self._length <= self._max_response
        self._save(b"".join(self._blocks) if is_kept else None)

    def _save(self, body: bytes | None) -> None:
        assert self._status is not None
        headers = [(name, value) for name, value in self._headers if self._is_chosen(name.lower())]
        try:
            if not self._rows.store(self._claim, Stored(self._status, headers, body)):
                # Nothing of this request may be committed, whatever the application catches.
                current_scope().doom()
                msg = (
                    "another request took the Idempotency-Key after a rollback by the application"
                )
                raise Taken(msg)
        except SQLAlchemyError as error:
            # An error page often follows an error that has aborted the transaction.
            if self._status[:1] not in "45":
                self.failure = error
                raise
        except Taken as error:
            self.failure = error
            raise

    def _is_chosen(self, name: str) -> bool:
        return name not in _NOT_STORED if self._chosen is None else name in self._chosen
