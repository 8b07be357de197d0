"""After a fork: a child never uses the pooled connections of its parent.

Two processes that speak on one database connection read each other's answers, see "Using
Connection Pools with Multiprocessing or os.fork()" in SQLAlchemy's documentation.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import Session

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import SessionTransaction, scoped_session

# Forks belong to the process, so this state does too. Weak: it keeps nobody's engine alive.
_registries: weakref.WeakSet[scoped_session[Any]] = weakref.WeakSet()
_engines: set[weakref.ref[Engine]] = set()
_pid = os.getpid()
_lock = threading.Lock()

# What the parent goes on to use. Some drivers say goodbye to the server when a connection is
# garbage-collected, on the socket of the parent: so the child keeps it, unused.
_inherited: list[object] = []


def watch_registry(registry: scoped_session[Any]) -> None:
    """Dispose of the engines this registry is bound to by the time of a fork."""
    _registries.add(registry)
    factory: Any = registry.session_factory
    # Only a Session class that chooses its engine itself pays for a listener.
    if factory.class_.get_bind is not Session.get_bind and not event.contains(
        factory, "after_begin", _after_begin
    ):
        event.listen(factory, "after_begin", _after_begin)


def _after_begin(_session: Session, _: SessionTransaction, connection: Connection) -> None:
    watch_engine(connection.engine)


def watch_engine(engine: Engine) -> None:
    """Dispose of this engine too: a Session used it, by whatever way it found it."""
    # Engine.execution_options() makes engines that share a pool, and pass.
    while (lasting := getattr(engine, "_proxied", None)) is not None:
        engine = lasting
    # Not a WeakSet, which is written in Python: this is asked once a transaction.
    if weakref.ref(engine) not in _engines:
        _engines.add(weakref.ref(engine, _engines.discard))


def connections(session: Session) -> Collection[Connection]:
    """Return the connections of a Session's transaction, and watch their engines."""
    transaction: Any = session.get_transaction()
    if transaction is None:
        return ()
    # The public way, to listen to after_begin, makes every request pay.
    found: set[Connection] = {entry[0] for entry in transaction._connections.values()}
    for connection in found:
        watch_engine(connection.engine)
    return found


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
                    watch_engine(bind.engine)
        for reference in list(_engines):
            engine = reference()
            if engine is not None:
                _inherited.append(engine.pool)
                engine.dispose(close=False)
        _pid = os.getpid()


def _abandon_sessions(sessions: dict[object, Session]) -> None:
    """Forget the parent's Sessions, without a word on their connections."""
    for session in sessions.values():
        _inherited.append(session)
        for connection in connections(session):
            if not (connection.closed or connection.invalidated):
                proxied: Any = connection.connection
                _inherited.append(proxied.dbapi_connection)
                # Or the pool sends a ROLLBACK when it is collected, at the latest when the child
                # exits. The recipe is in "Using Connection Pools with Multiprocessing".
                if not proxied.is_detached:
                    proxied._connection_record.dbapi_connection = None
                proxied.dbapi_connection = None
    sessions.clear()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=dispose_after_fork)
