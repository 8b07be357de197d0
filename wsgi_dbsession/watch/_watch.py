"""The watch: an observer that records holders, waiters and ended scopes."""

from __future__ import annotations

import math
import os
import socket
import threading
import weakref
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import event

from wsgi_dbsession._registry import adopt, observe
from wsgi_dbsession._scope import Observer

from ._account import Account
from ._board import Board, allow_loopback
from ._guard import Guard
from ._holder import backend_pid
from ._pool import WatchedPool
from ._show import show_holders, show_waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment
    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session

    from wsgi_dbsession._scope import Scope

    from ._records import Ended, Holder, Place, PoolUse, Waiter

F = TypeVar("F", bound="Callable[[Ended], object]")

_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


class Watch(Observer):
    """Record who holds the connections, who waits for one, and what scopes did with theirs.

    ::

        watch = Watch(Session, warn_after=2.0)
        app = SessionMiddleware(app, Session, observers=[watch])
        app = watch.board(app, "/_db")

    The watch starts when it is created. It records each connection of the engines to which the
    registries are bound, and of other engines after a Session has used them. It observes each
    scope whose middleware or block has one of the registries, as :func:`observe` does. Pass it as
    one of the `observers` to a middleware that has none of them.

    When a pool times out, a note on the :exc:`sqlalchemy.exc.TimeoutError` lists the holders, and
    so does an ERROR in the log.

    Each process has its own records. The watch sends no query to the database.

    :param registries: the ``scoped_session`` objects whose connections to watch.
    :param warn_after: log a warning when a connection has been held for more than this many
        seconds: without a statement, by a stream, or beyond its scope's end. Each line of the
        application causes one warning of each kind. None disables them.
    :raises TypeError: see :class:`session_scope`, or ``warn_after`` is not a number.
    :raises ValueError: see :class:`session_scope`, or ``warn_after`` is not positive.
    """

    def __init__(self, *registries: scoped_session[Any], warn_after: float | None = None) -> None:
        _check(warn_after)
        adopted = adopt(registries)
        self.warn_after = warn_after
        self._account = Account(f"wsgi_dbsession.watch {id(self):#x}")
        self._pools: list[WatchedPool] = []
        self._lock = threading.Lock()
        if warn_after is not None:
            self._account.guard = Guard(warn_after, self._account.held)
        self._observing = [observe(registry, self) for registry in dict.fromkeys(registries)]
        self._listeners: list[tuple[type[Session], Callable[..., None]]] = []
        for registry in adopted:
            factory: Any = registry.createfunc
            binds: list[Any] = [factory.kw.get("bind"), *(factory.kw.get("binds") or {}).values()]
            for bind in binds:
                if bind is not None:
                    self._watch_engine(bind.engine)
            # For other engines, from get_bind() or a later configure().
            listener = self._make_listener()
            event.listen(factory.class_, "after_begin", listener)
            self._listeners.append((factory.class_, listener))
        _watches.add(self)

    def close(self) -> None:
        """Stop watching: restore the pools and dialects."""
        while self._observing:
            self._observing.pop().__exit__()
        while self._listeners:
            kind, listener = self._listeners.pop()
            event.remove(kind, "after_begin", listener)
        with self._lock:
            pools, self._pools = self._pools, []
        for pool in pools:
            pool.release()
        self._account.forget_holders()
        _watches.discard(self)

    def closed(self, scope: Scope) -> None:
        """Close the account of a scope, if it has one."""
        account = self._account
        hold = scope.info.pop(account.key, None)
        if hold is not None:
            account.close(hold, scope)

    def _make_listener(self) -> Callable[..., None]:
        # One for each class: SQLAlchemy 2.0 cannot remove the same listener from two.
        account, holds = self._account, self._account.holds

        def begun(_: Session, __: SessionTransaction, connection: Connection) -> None:
            pooled = connection.connection
            key = id(pooled.dbapi_connection)
            if key not in holds and not pooled.is_detached:
                # Its pool was not watched at the checkout.
                hold = account.asked(self._watch_engine(connection.engine))
                account.backends[key] = backend_pid(pooled.dbapi_connection)
                account.got(hold, pooled)

        return begun

    def _watch_engine(self, engine: Engine) -> WatchedPool:
        with self._lock:
            for watched in self._pools:
                # Engine.execution_options() returns an engine with the same dialect.
                if watched.dialect() is engine.dialect:
                    watched.track(engine.pool)
                    return watched
            self._pools = [each for each in self._pools if not each.is_gone()]
            watched = WatchedPool(engine, self._account)
            name, names = watched.name, {each.name for each in self._pools}
            number = 1
            while watched.name in names:
                number += 1
                watched.name = f"{name} #{number}"
            self._pools.append(watched)
            return watched

    # -- what it returns --------------------------------------------------------------------------

    def holders(self) -> list[Holder]:
        """Return who holds a connection right now, the one with the longest time first."""
        account = self._account.of_this_process()
        return show_holders(account.holds, account.backends, self.warn_after)

    def waiting(self) -> list[Waiter]:
        """Return who waits for a connection right now, the one with the longest time first."""
        return show_waiting(self._account.of_this_process().waiting)

    def ended(self) -> list[Ended]:
        """Return the last scopes that have ended, the last one first.

        Scopes that asked for no connection are left out. If the pool timed out or the database
        refused the connection, ``connections`` is 0.
        """
        return self._account.of_this_process().show_ended()

    def places(self) -> list[Place]:
        """Return the lines at which scopes first asked for a connection.

        The line with the longest time comes first.
        """
        return self._account.of_this_process().show_places()

    def pools(self) -> list[PoolUse]:
        """Return the pools, and how much of each is in use."""
        self._account.of_this_process()
        with self._lock:
            uses = [pool.use() for pool in self._pools]
        return [use for use in uses if use is not None]

    def on_end(self, callback: F) -> F:
        """Call ``callback(ended)`` for each scope that :meth:`ended` returns.

        It runs in the thread of the scope, and its errors are logged. A callback may use scopes
        itself: they are recorded, but no callback is called for them.

        :param callback: a callable that takes an :class:`Ended`.
        :return: the callback, so that this method works as a decorator too.
        """
        self._account.callbacks += (callback,)
        return callback

    def board(
        self,
        app: WSGIApplication,
        path: str = "/_db",
        allow: Callable[[WSGIEnvironment], bool] = allow_loopback,
    ) -> Board:
        """Return the application with a page that shows all this and refreshes itself.

        :param app: the WSGI application with all its middlewares, so that the page answers even
            if they fail.
        :param path: the path of the page.
        :param allow: called with the environ, returns whether to answer; otherwise the client
            gets a 404. The default answers clients on this machine only, and none under waitress,
            see :func:`allow_loopback`.
        :return: the WSGI application to serve.
        :raises TypeError: ``app`` or ``allow`` is not callable.
        :raises ValueError: ``path`` does not begin with a slash.
        """
        return Board(app, path, allow, self._report)

    def _report(self) -> dict[str, Any]:
        account = self._account.of_this_process()
        return {
            "pid": account.pid,
            "host": socket.gethostname(),
            "started": account.started,
            "now": datetime.now(timezone.utc),
            "warn_after": self.warn_after,
            "retries": account.retries,
            "pools": self.pools(),
            "holders": self.holders(),
            "waiting": self.waiting(),
            "ended": self.ended(),
            "places": self.places(),
        }

    def _reset(self) -> None:
        """Reset the watch in a child process."""
        self._lock = threading.Lock()
        self._account.reset()


def _check(warn_after: object) -> None:
    if warn_after is None:
        return
    if not isinstance(warn_after, (int, float)) or isinstance(warn_after, bool):
        msg = f"warn_after must be None or a number of seconds, got {warn_after!r}"
        raise TypeError(msg)
    if not 0 < warn_after < math.inf:
        msg = f"warn_after must be positive, got {warn_after!r}. Pass None to never warn"
        raise ValueError(msg)


def _reset_all() -> None:
    for watch in list(_watches):
        watch._reset()  # pyright: ignore[reportPrivateUsage] - the same module


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_reset_all)
