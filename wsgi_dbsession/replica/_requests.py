"""The current requests: the position that each needs, and the positions of its commits."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from wsgi_dbsession._driver import autocommits

from ._commit import Commit
from ._position import NOWHERE

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import PoolProxiedConnection

    from ._position import Cookies, Position


class Request:
    """The position that one request needs, and the position after its last commit."""

    __slots__ = ("_cookies", "_header", "_needed", "_written")

    def __init__(self, cookies: Cookies, environ: WSGIEnvironment) -> None:
        self._cookies = cookies
        self._header: str = environ.get("HTTP_COOKIE", "")
        self._needed: Position | None = None
        self._written: Position | None = None

    def position(self) -> Position:
        """Return the position that a replica must have replayed."""
        if self._needed is None:
            self._needed = self._cookies.position(self._header)
        return self._needed if self._written is None else self._needed.join(self._written)

    def note(self, position: Position) -> None:
        """Record the database's position after a COMMIT of this request."""
        self._written = position if self._written is None else self._written.join(position)

    def start(self, start_response: StartResponse) -> StartResponse:
        """Return a ``start_response`` that adds the cookie.

        SessionMiddleware holds the start until the outcome, unless it sends a block before that.
        """

        def start(
            status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
        ) -> Callable[[bytes], object]:
            if self._written is not None:
                headers = [*headers, *self._cookies.headers(self._written, self._header)]
            if exc_info is None:
                return start_response(status, headers)
            try:
                return start_response(status, headers, exc_info)
            finally:
                exc_info = None  # a traceback that refers to this frame is a cycle

        return start


def listen(primary: Engine, requests: Callable[[], list[Request]]) -> None:
    """Record the primary's position in the current requests after each COMMIT.

    SQLAlchemy has no event after a COMMIT, so this replaces methods of the engine's dialect. At
    AUTOCOMMIT a connection may return to the pool without a COMMIT, so this also listens to
    "reset".

    :param primary: the engine of the primary.
    :param requests: returns the current requests of one ``Replicas``. An engine may have several.
    :raises ValueError: it is not PostgreSQL with one of the supported drivers.
    """
    commit = Commit(primary)
    sources = vars(primary.dialect).setdefault("dbsession_requests", [])
    sources.append(requests)
    if len(sources) == 1:  # one replacement records the position for all of them
        _replace(primary, commit, lambda: [each for source in sources for each in source()])


def _replace(primary: Engine, commit: Commit, requests: Callable[[], list[Request]]) -> None:
    dialect: Any = primary.dialect
    usual, usual_twophase = dialect.do_commit, dialect.do_commit_twophase

    def note(position: Position | None) -> None:
        if position is not None:
            for request in requests():
                request.note(position)

    # The core looks for these names in tracebacks.
    def do_commit(connection: PoolProxiedConnection) -> None:
        if requests():
            driver = connection.dbapi_connection
            note(commit(driver, functools.partial(usual, connection)))
        else:
            usual(connection)

    def do_commit_twophase(connection: Connection, *args: Any, **options: Any) -> None:
        usual_twophase(connection, *args, **options)
        note(NOWHERE)

    def on_reset(driver: DBAPIConnection, *_: object) -> None:
        # If the connection is lost, this fails and the pool discards it. After a failed "checkin"
        # listener, a connection would never return to the pool.
        if autocommits(driver) and requests():
            position = NOWHERE
            try:
                position = commit.at_autocommit(driver)
            finally:
                note(position)

    dialect.do_commit, dialect.do_commit_twophase = do_commit, do_commit_twophase
    event.listen(primary, "reset", on_reset)
