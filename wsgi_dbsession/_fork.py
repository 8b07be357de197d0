"""After a fork: a child never uses the pooled connections of its parent.

Two processes that speak on one database connection read each other's answers, see "Using
Connection Pools with Multiprocessing or os.fork()" in SQLAlchemy's documentation.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

CONNECTIONS = "wsgi_dbsession.connections"
"""Where a Session's ``info`` has the connections of its transaction, by engine."""

# Forks belong to the process, so this state does too. Weak: it keeps nobody's engine alive.
_registries: weakref.WeakSet[scoped_session[Any]] = weakref.WeakSet()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_pid = os.getpid()
_lock = threading.Lock()

# What the parent goes on to use. Some drivers say goodbye to the server when a connection is
# garbage-collected, on the socket of the parent: so the child keeps it, unused.
_inherited: list[object] = []


def watch_registry(registry: scoped_session[Any]) -> None:
    """Dispose of the engines this registry is bound to by the time of a fork."""
    _registries.add(registry)


def watch_engine(engine: Engine) -> None:
    """Dispose of this engine too: a Session used it, by whatever way it found it."""
    # Engine.execution_options() makes engines that share a pool, and pass.
    while (lasting := getattr(engine, "_proxied", None)) is not None:
        engine = lasting
    _engines.add(engine)


def dispose_after_fork() -> None:
    """Start with empty pools and registries, if this process is a child that has not yet.

    Called by Python in every child that ``os.fork()`` makes, and before a scope makes its first
    Session: uWSGI forks in C, and runs Python's handlers only with ``py-call-osafterfork``.
    """
    global _pid
    if os.getpid() == _pid:
        return
    with _lock:  # in a child only, and the second thread finds it done
        if os.getpid() == _pid:
            return
        for registry in list(_registries):
            _abandon_sessions(registry.registry.registry)
            options: dict[str, Any] = registry.session_factory.kw
            binds: dict[Any, Any] = options.get("binds") or {}
            for bind in (options.get("bind"), *binds.values()):
                if bind is not None:
                    _engines.add(bind.engine)
        for engine in list(_engines):
            _inherited.append(engine.pool)
            engine.dispose(close=False)
        _pid = os.getpid()


def _abandon_sessions(sessions: dict[object, Session]) -> None:
    """Forget the parent's Sessions, without a word on their connections."""
    for session in sessions.values():
        _inherited.append(session)
        for connection in session.info.get(CONNECTIONS, {}).values():
            if not (connection.closed or connection.invalidated):
                proxied = connection.connection
                _inherited.append(proxied.dbapi_connection)
                # Or the pool sends a ROLLBACK when it is collected, at the latest when the child
                # exits. The recipe is in "Using Connection Pools with Multiprocessing".
                if not proxied.is_detached:
                    proxied._connection_record.dbapi_connection = None
                proxied.dbapi_connection = None
    sessions.clear()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=dispose_after_fork)
