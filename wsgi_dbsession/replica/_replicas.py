"""Route reads to replicas that have everything their client has written."""

from __future__ import annotations

import itertools
import time
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from wsgi_dbsession._driver import is_autocommit, is_read_only
from wsgi_dbsession._report import log
from wsgi_dbsession._scope import find_scope
from wsgi_dbsession._step import scopes

from ._position import NOWHERE, START, Cookies, Position
from ._read_only import is_refused_write
from ._requests import Request, listen
from ._routing import Router, has_safe_method, is_retried

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

# Key in Connection.info: a position that the connection's server has replayed. It is kept with the
# connection, because a server that has crashed may restart at an earlier position, and because an
# address may lead to another server.
_REPLAYED = "wsgi_dbsession.replayed"

# PostgreSQL shows the timeline that a standby receives only to roles with pg_read_all_stats. It
# shows all roles that of the last restartpoint, which the server has certainly reached.
_POSITION = """SELECT pg_last_wal_replay_lsn()::text, coalesce(
 (SELECT received_tli FROM pg_stat_wal_receiver),
 (SELECT timeline_id FROM pg_control_checkpoint()))"""


class Replicas:
    """Route safe requests to replicas that have everything their client has written.

    ::

        replicas = Replicas(primary, [replica1, replica2], secret=...)
        Session = scoped_session(sessionmaker(class_=replicas.Session), scopefunc=current_scope)
        app = replicas.wrap(RetryMiddleware(SessionMiddleware(app, Session)))

    After a COMMIT, the client gets a cookie with the position in the write-ahead log. A safe
    request with that cookie reads from a replica that has replayed the log up to the position. If
    the replica whose turn it is has not, the request reads from the primary.

    :param primary: the engine of the primary: PostgreSQL 13 or later with psycopg, psycopg2 or
        pg8000.
    :param replicas: the engines of its streaming replicas, for example made by
        :func:`read_only_engine`. They must not connect through a pooler.
    :param secret: the key of the cookies' signature, at least 16 bytes, the same in all processes.
    :param cookie: the prefix of the cookies' names.
    :param max_age: for how many seconds a client keeps a cookie. After that it may read old data
        from a replica that lags further behind.
    :param secure: whether clients send the cookie over HTTPS only.
    :param when: called with a request's environ, returns whether the request only reads.
    :param pause: for how many seconds an unreachable replica is not tried again.
    :raises TypeError: an engine is not an ``Engine``, or ``when`` is not callable.
    :raises ValueError: there is no replica, the primary is not supported, or another argument is
        out of range.
    """

    def __init__(
        self,
        primary: Engine,
        replicas: Sequence[Engine],
        *,
        secret: str | bytes,
        cookie: str = "dbpos",
        max_age: int = 600,
        secure: bool = False,
        when: Callable[[WSGIEnvironment], bool] = has_safe_method,
        pause: float = 5.0,
    ) -> None:
        for engine in (primary, *replicas):
            kind: type = type(engine)  # callers without a type checker may pass anything
            if not issubclass(kind, Engine):
                msg = f"primary and replicas must be engines, got {engine!r}. Use create_engine()."
                raise TypeError(msg)
        if not replicas:
            msg = "replicas must have at least one engine, got none"
            raise ValueError(msg)
        if pause < 0:
            msg = f"pause must be at least 0 seconds, got {pause!r}"
            raise ValueError(msg)
        self._cookies = Cookies(cookie, secret, max_age, secure=secure)
        self._key = f"wsgi_dbsession.replica.{cookie}"
        self._replicas = [_Replica(engine, pause) for engine in replicas]
        self._turn = itertools.count()
        self._refused: weakref.WeakSet[Exception] = weakref.WeakSet()
        self._primary = primary
        self._router = Router(primary, self._connect, when)
        self.Session: type[Session] = self._router.session_class()
        """The class of Sessions that read from replicas: ``sessionmaker(class_=...)``."""
        listen(primary, self._requests)

    def wrap(self, app: WSGIApplication) -> WSGIApplication:
        """Return the application, wrapped in a middleware that sets the cookie.

        It raises ``RuntimeError`` at a request if a SessionMiddleware is around it. Put
        RetryMiddleware inside: ``wrap()`` lets it retry writes that a replica has refused.

        :param app: a :class:`SessionMiddleware`, or a middleware around it.
        """
        inner: Any = app
        while inner is not None:
            if hasattr(inner, "retry_on"):
                inner.retry_on(self._is_refused_write)
            inner = getattr(inner, "app", None)

        def application(
            environ: WSGIEnvironment, start_response: StartResponse
        ) -> Iterable[bytes]:
            if any(scope.environ is environ for scope in scopes()):
                msg = (
                    "replicas.wrap() is inside of a SessionMiddleware, which commits too late for "
                    "the cookie. Write app = replicas.wrap(SessionMiddleware(app, Session))"
                )
                raise RuntimeError(msg)
            request = environ[self._key] = Request(self._cookies, environ)
            return app(environ, request.start(start_response))

        return application

    # -- reading ----------------------------------------------------------------------------------

    def _connect(self, *, required: bool) -> Connection | None:
        requests = self._requests()
        if not requests and any(scope.environ is not None for scope in scopes()):
            msg = (
                "the application is not wrapped, so its clients do not get the cookie. Write "
                "app = replicas.wrap(SessionMiddleware(app, Session))"
            )
            raise RuntimeError(msg)
        # A further attempt uses the primary, because a replica may have caused the failure.
        connection = None if is_retried() else self._read(requests)
        if connection is None and required:
            connection = self._primary.connect()
            if is_autocommit(connection):
                # psycopg makes transactions read-only, but at AUTOCOMMIT there would be none.
                connection.execution_options(isolation_level="READ COMMITTED")
            connection.execution_options(postgresql_readonly=True)
        return connection

    def _read(self, requests: list[Request]) -> Connection | None:
        """Return a connection to a replica that covers the position of all requests, or None."""
        needed = START
        for request in requests:
            needed = needed.join(request.position())
        if needed == NOWHERE:
            return None
        first = next(self._turn)
        for number in range(len(self._replicas)):
            replica = self._replicas[(first + number) % len(self._replicas)]
            connection = replica.connect()
            if connection is not None:
                # If it is behind, use the primary: asking another replica costs a round trip, too.
                return connection if replica.covers(connection, needed) else None
        return None

    def _is_refused_write(self, error: Exception) -> bool:
        """Return whether a replica refused a write of a request that may run on the primary."""
        if not is_refused_write(error):
            return False
        # RetryMiddleware calls this when the error occurs, and again after the scope.
        if self._router.reads(find_scope()) is None and not is_retried():
            self._refused.add(error)
        return error in self._refused

    def _requests(self) -> list[Request]:
        """Return the current requests, from the innermost outwards."""
        environs = [scope.environ for scope in scopes()]
        return [environ[self._key] for environ in environs if environ and self._key in environ]


class _Replica:
    """One replica, which is not tried for a while after a failure."""

    __slots__ = ("_engine", "_pause", "_until")

    def __init__(self, engine: Engine, pause: float) -> None:
        self._engine = engine
        self._pause = pause
        self._until = 0.0

    def connect(self) -> Connection | None:
        """Return a read-only connection, or None if the replica is paused or unreachable."""
        if time.monotonic() < self._until:
            return None
        connection: Connection | None = None
        try:
            connection = self._engine.connect()
            if is_read_only(connection):
                return connection
            # The server may be promoted during the transaction.
            connection = connection.execution_options(postgresql_readonly=True)
        except (DBAPIError, OSError) as error:
            self._fail(connection, error)
            return None
        if is_autocommit(connection):
            connection.close()
            msg = (
                f"a replica at AUTOCOMMIT must be made by read_only_engine(), got {self._engine!r}"
                ", which would execute writes if it was promoted. Pass read_only_engine(engine)."
            )
            raise RuntimeError(msg)
        return connection

    def covers(self, connection: Connection, needed: Position) -> bool:
        """Return whether the connection's server covers a position, otherwise close it."""
        info = connection.info
        if info.get(_REPLAYED, START).covers(needed):
            return True
        try:
            lsn, timeline = connection.exec_driver_sql(_POSITION).one()
            # End the transaction: at REPEATABLE READ, its snapshot may be older than the position.
            connection.rollback()
        except (DBAPIError, OSError) as error:
            self._fail(connection, error)
            return False
        if lsn is not None and timeline is not None:
            position = info[_REPLAYED] = Position.read(timeline, lsn)
            if position.covers(needed):
                return True
        connection.close()
        return False

    def _fail(self, connection: Connection | None, error: BaseException) -> None:
        self._until = time.monotonic() + self._pause
        url, original = self._engine.url.render_as_string(), getattr(error, "orig", error)
        reason = " ".join(str(original).split())
        message = "not reading from replica %s for %.1f s: %s"
        log.warning(message, url, self._pause, reason, extra={"replica": url})
        if connection is not None:
            connection.close()
