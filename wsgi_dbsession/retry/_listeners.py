"""What tells the running attempts of commits and errors, wherever they come from.

Not the events of connections, though one of them is for COMMIT: whoever listens to any of them
slows down every statement of the process, by a sixth for a small one. The methods of a dialect
that send a COMMIT see the same, also where no Session sends it.
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
"""Each ``do_commit`` of :func:`_watch`, which lives as long as its dialect."""
_reading: weakref.WeakSet[PoolProxiedConnection] = weakref.WeakSet()
"""What Sessions read from, where the server refuses writes; its dialect may be another's too."""


def listen() -> None:
    """Listen to all Sessions, pools and engines, even those that belong to no registry."""
    if event.contains(Session, "after_begin", _on_begin):
        return
    event.listen(Pool, "checkout", _on_checkout)
    event.listen(Engine, "handle_error", _on_error)
    event.listen(Session, "after_begin", _on_begin)
    event.listen(Session, "after_commit", _on_commit)
    event.listen(Session, "after_soft_rollback", _on_soft_rollback)


def _on_checkout(_: object, __: ConnectionPoolEntry, proxy: Any) -> None:
    # Without an attempt too: the connection may be kept, and commit in one. A pool has no public
    # way to its dialect, and without an engine only a substitute for it.
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
        return  # not of a flush, and an unrelated exception may be handled meanwhile
    # A flush may fail with an error that the database knows nothing of: StaleDataError.
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
    """Learn what an engine's dialect commits and rolls back.

    Methods of a dialect are there to be replaced in subclasses; an engine that exists has an
    object.
    """
    commit, rollback = dialect.do_commit, dialect.do_rollback
    # On top only: what replaced it later, as Replicas does, may send COMMIT without calling it.
    # To be there twice does no harm.
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
        # A prepared transaction that is not undone may still be committed.
        found = _start(attempts()) if is_prepared else []
        rollback(connection, xid, is_prepared, recover)
        for attempt in found:
            attempt.end_phase()

    dialect.do_prepare_twophase = do_prepare_twophase
    dialect.do_commit_twophase = do_commit_twophase
    dialect.do_rollback_twophase = do_rollback_twophase


def _attempts_on(connection: PoolProxiedConnection) -> list[Attempt]:
    """Return the attempts for which a COMMIT or ROLLBACK on this connection counts."""
    found = attempts()
    return [] if found and connection in _reading else found


def _start(found: list[Attempt]) -> list[Attempt]:
    for attempt in found:
        attempt.start_commit()
    return found
