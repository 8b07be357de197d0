"""Record all commits and errors of the database in the current attempts.

A listener of ``ConnectionEvents.commit`` would slow down each statement of the process, a short
one by a sixth. So this wraps the dialect's methods that send COMMIT, whether or not a Session
calls them.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import Dialect, Engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from wsgi_dbsession._driver import READ_ONLY, is_read_only

from ._attempt import attempts

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.orm import SessionTransaction
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from ._attempt import Attempt

_wrappers: weakref.WeakSet[Callable[[PoolProxiedConnection], None]] = weakref.WeakSet()
"""The ``do_commit`` functions made by :func:`_watch`; each lives as long as its dialect."""
_reading: weakref.WeakSet[PoolProxiedConnection] = weakref.WeakSet()
"""Connections on which the server refuses writes. A writing engine may share their dialect."""


def listen() -> None:
    """Listen to all Sessions, pools and engines, even if they do not belong to a registry."""
    if event.contains(Session, "after_begin", _on_begin):
        return
    event.listen(Pool, "checkout", _on_checkout)
    event.listen(Engine, "handle_error", _on_error)
    event.listen(Session, "after_begin", _on_begin)
    event.listen(Session, "after_commit", _on_commit)
    event.listen(Session, "after_soft_rollback", _on_soft_rollback)


def _on_checkout(_: object, __: ConnectionPoolEntry, proxy: Any) -> None:
    # Even outside of an attempt, because a later one may use and commit the open connection. A
    # pool's dialect is private, and a placeholder if the pool does not belong to an engine.
    dialect = proxy._pool._dialect
    if isinstance(dialect, Dialect):
        _watch(dialect)
    for attempt in attempts():
        attempt.check_out(proxy)


def _on_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    if is_read_only(connection):
        _reading.add(connection.connection)
    else:
        _watch(connection.dialect)
    for attempt in attempts():
        attempt.begin(session, transaction, connection)


def _on_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        for attempt in attempts():
            attempt.end_indirect_commit()


def _on_soft_rollback(_: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None or transaction.nested:
        return  # it is not a flush, and sys.exc_info() may be unrelated
    # A flush may raise an error that does not come from the database, such as StaleDataError.
    error = sys.exc_info()[1]
    if error is not None and not isinstance(error, DBAPIError):
        for attempt in attempts():
            attempt.note(error)


def _on_error(context: ExceptionContext) -> None:
    unknown = [attempt for attempt in attempts() if attempt.fail(context)]
    error = context.sqlalchemy_exception
    if unknown and isinstance(error, DBAPIError):
        error.add_detail("Outcome unknown: the transaction may have been committed.")


def _watch(dialect: Any) -> None:
    """Wrap the methods with which a dialect commits and rolls back.

    SQLAlchemy means them to be overridden in subclasses, but an existing engine has an instance.
    """
    commit, rollback = dialect.do_commit, dialect.do_rollback
    # Wrap again if another wrapper came later: that of Replicas may send COMMIT without calling
    # this one. Two wrappers do no harm.
    if commit in _wrappers or getattr(dialect, READ_ONLY, False):
        return

    # The core looks for these names in tracebacks.
    def do_commit(connection: PoolProxiedConnection) -> None:
        found = _start(_attempts_on(connection))
        commit(connection)
        for attempt in found:
            attempt.end_commit(connection.dbapi_connection)

    def do_rollback(connection: PoolProxiedConnection) -> None:
        for attempt in _attempts_on(connection):
            attempt.roll_back(connection.dbapi_connection)
        rollback(connection)

    _wrappers.add(do_commit)
    dialect.do_commit, dialect.do_rollback = do_commit, do_rollback
    _watch_phases(dialect)


def _watch_phases(dialect: Any) -> None:
    prepare, commit = dialect.do_prepare_twophase, dialect.do_commit_twophase
    rollback = dialect.do_rollback_twophase

    def do_prepare_twophase(connection: Connection, xid: object) -> None:
        found = _start(attempts())
        prepare(connection, xid)
        for attempt in found:
            attempt.end_phase()

    def do_commit_twophase(connection: Connection, *args: Any, **options: Any) -> None:
        found = _start(attempts())
        commit(connection, *args, **options)
        for attempt in found:
            attempt.end_commit(connection.connection.dbapi_connection)

    def do_rollback_twophase(
        connection: Connection, xid: object, is_prepared: bool = True, recover: bool = False
    ) -> None:
        # A prepared transaction that is not rolled back may still be committed.
        found = _start(attempts()) if is_prepared else []
        rollback(connection, xid, is_prepared, recover)
        for attempt in found:
            attempt.end_phase()

    dialect.do_prepare_twophase = do_prepare_twophase
    dialect.do_commit_twophase = do_commit_twophase
    dialect.do_rollback_twophase = do_rollback_twophase


def _attempts_on(connection: PoolProxiedConnection) -> list[Attempt]:
    """Return the attempts that a COMMIT or ROLLBACK on this connection concerns."""
    found = attempts()
    return [] if found and connection in _reading else found


def _start(found: list[Attempt]) -> list[Attempt]:
    for attempt in found:
        attempt.start_commit()
    return found
