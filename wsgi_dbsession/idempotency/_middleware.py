"""The middleware: it checks its arguments, claims keys and replays stored responses."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from sqlalchemy import Table
from sqlalchemy.orm import scoped_session

from wsgi_dbsession._middleware import SessionMiddleware
from wsgi_dbsession._scope import current_scope

from ._problem import Problem
from ._record import HOP_BY_HOP, Recording, respond
from ._replay import replay
from ._request import fingerprint, identify, read_body, read_key
from ._row import Row
from ._rows import Claim, Found, Rows
from ._table import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# RFC 9110, section 9.2.1: a request with one of these methods is not meant to have an effect.
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

_HEADER = "HTTP_IDEMPOTENCY_KEY"
_KEY = "wsgi_dbsession.idempotency_key"


class Idempotency:
    """Make requests that are repeated with the same ``Idempotency-Key`` take effect once.

    ::

        keys = idempotency_table(Base.metadata)
        app = SessionMiddleware(Idempotency(app, Session, keys, principal=user_of), Session)

    The application handles the first request with a key, and the middleware stores the response in
    the request's transaction. For a later request the middleware sends the stored response, with
    ``Idempotent-Replayed: true``, and does not call the application. A rollback also discards the
    key, so the client can repeat a failed request with the same key.

    Put it directly inside :class:`SessionMiddleware`. Safe methods (GET, HEAD, OPTIONS, TRACE) and
    requests without the header pass through unchanged. The application finds the key in
    ``environ["wsgi_dbsession.idempotency_key"]``.

    :param app: the WSGI application.
    :param registry: the application's registry. The table must be in its database.
    :param table: made by :func:`idempotency_table`.
    :param principal: called with environ, returns who sends the request, or None for an anonymous
        client. A principal never gets the response of another one. Return only what has been
        verified, or the credentials themselves, because the application cannot check a client that
        gets a stored response.
    :param required: whether an unsafe request without a key is refused, or a callable that is
        called with environ and returns that.
    :param wait: whether a request waits while another one with the same key is running. With
        False, the client gets a 409 at once on PostgreSQL and MariaDB. Other databases still wait.
    :param max_body: a request with a key and a longer body, in bytes, is refused. The body is kept
        in memory.
    :param max_response: a longer response, in bytes, is not stored.
    :param headers: names of the response's headers to store. None stores all except ``Date``,
        ``Set-Cookie`` and those that belong to one connection.
    :raises TypeError: if an argument has the wrong type, or ``app`` is a SessionMiddleware.
    :raises ValueError: if a number is negative, the table lacks a column, or a header belongs to
        one connection only.
    """

    def __init__(
        self,
        app: WSGIApplication,
        registry: scoped_session[Any],
        table: Table,
        *,
        principal: Callable[[WSGIEnvironment], str | None],
        required: bool | Callable[[WSGIEnvironment], bool] = False,
        wait: bool = True,
        max_body: int = 1 << 20,
        max_response: int = 1 << 20,
        headers: Iterable[str] | None = None,
    ) -> None:
        _check_app(app)
        _check_kind("registry", registry, scoped_session, "Pass the application's own")
        _check_kind("table", table, Table, "Make it by idempotency_table()")
        if missing := sorted(COLUMNS.difference(table.c.keys())):
            msg = (
                f"table must have the columns {', '.join(missing)}, got {table!r}. "
                "Make it by idempotency_table()"
            )
            raise ValueError(msg)
        if not callable(principal):
            msg = (
                f"principal must be callable, got {principal!r}. "
                "Pass principal(environ), which returns who sends the request"
            )
            raise TypeError(msg)
        if not callable(required):
            _check_kind("required", required, bool, "Pass True, False or required(environ)")
        _check_kind("wait", wait, bool, "Pass True or False")
        for name, value in (("max_body", max_body), ("max_response", max_response)):
            _check_kind(name, value, int, "Pass a number of bytes")
            if value < 0:
                msg = f"{name} must be at least 0, got {value!r}. Pass a number of bytes"
                raise ValueError(msg)
        self.app = app
        self._principal = principal
        self._required = required
        self._max_body = max_body
        self._max_response = max_response
        self._headers = None if headers is None else _choose(headers)
        self._rows = Rows(registry, table, wait)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request."""
        # An inner request with a copy of the environ would wait for the key of the outer one.
        if environ["REQUEST_METHOD"] in _SAFE_METHODS or _KEY in environ:
            return self.app(environ, start_response)
        try:
            claim = self._read(environ)
            found = None if claim is None else self._find(claim)
            if claim is not None and found is not None:
                return replay(found, claim.fingerprint, start_response)
        except Problem as problem:
            return problem.respond(start_response)
        if claim is None:
            return self.app(environ, start_response)
        environ[_KEY] = claim.key
        row = Row(self._rows, claim)
        recording = Recording(start_response, row, self._max_response, self._headers)
        return respond(self.app, environ, recording)

    def _find(self, claim: Claim) -> Found | None:
        """Claim the key, see :meth:`Rows.claim`."""
        scope = current_scope()
        scope.read_only = False  # even if the request only reads, the middleware writes the key
        begun = any(session.in_transaction() for session in scope.sessions.values())
        found = self._rows.claim(claim)
        if found is not None and not begun:
            # Commit even if the stored status is 4xx or 5xx: there is nothing to discard, and
            # wsgi_dbsession.replica sets its cookie only after a COMMIT.
            scope.keep()
        return found

    def _read(self, environ: WSGIEnvironment) -> Claim | None:
        """Read the key and the body, and let the application read the body again.

        :return: None if the request has no key.
        :raises Problem: if a key is required, or the request is malformed or too long.
        """
        header = environ.get(_HEADER)
        if header is None:
            required = self._required
            if required(environ) if callable(required) else required:
                raise Problem(
                    "400 Bad Request",
                    "key_missing",
                    "This request needs an Idempotency-Key. Use a new key for each operation, and "
                    "the same key each time that you repeat its request.",
                )
            return None
        key = read_key(header)
        principal = self._principal(environ)
        if principal is not None:
            _check_kind("principal", principal, str, "Return a string or None")
        body = read_body(environ, self._max_body)
        environ["wsgi.input"] = io.BytesIO(body)
        return Claim(identify(principal, key), key, fingerprint(environ, body))


def _check_app(app: object) -> None:
    if not callable(app):
        msg = f"app must be callable, got {app!r}. Pass the WSGI application"
        raise TypeError(msg)
    if any(isinstance(each, SessionMiddleware) for each in (app, getattr(app, "app", None))):
        msg = (
            f"app must be inside of SessionMiddleware, got {app!r}. Write "
            "`SessionMiddleware(Idempotency(app, Session, keys, principal=...), Session)`"
        )
        raise TypeError(msg)


def _check_kind(name: str, value: object, kind: type, fix: str) -> None:
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "aeiou" else "a"
        msg = f"{name} must be {article} {kind.__name__}, got {value!r}. {fix}"
        raise TypeError(msg)


def _choose(headers: Iterable[str]) -> frozenset[str]:
    """Return the names of the headers to store, in lower case."""
    if isinstance(headers, str):
        msg = f"headers must be several names, got {headers!r}. Pass a list"
        raise TypeError(msg)
    chosen: set[str] = set()
    for name in headers:
        _check_kind("each of headers", name, str, "Pass names of headers")
        if name.lower() in HOP_BY_HOP:
            msg = f"headers must not contain {name!r}. It belongs to one connection: remove it"
            raise ValueError(msg)
        chosen.add(name.lower())
    return frozenset(chosen) - {"content-length"}
