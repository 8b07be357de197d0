"""A transaction that the database has ended or aborted, though the application goes on."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError

from ._driver import (
    CHANGES,
    ask,
    codes,
    dialect_names,
    driver_of,
    is_aborted,
    is_autocommit,
    passed_through,
    spoiler,
)
from ._step import active_step

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext

# With these, MySQL and MariaDB have rolled back the transaction: a deadlock, a row that has
# changed since it was read (`innodb_snapshot_isolation`), no room for locks.
_ROLLED_BACK = {"1213", "1020", "1206"}
_LOCK_TIMEOUT = "1205"  # with this one only if innodb_rollback_on_timeout is set
_ROLLS_BACK_ON_TIMEOUT = "SELECT @@innodb_rollback_on_timeout"


def spoil(connection: Connection, error: BaseException) -> None:
    """Keep the connection's transaction from being committed, even if the error is caught."""
    transaction = connection.get_transaction()
    if transaction is not None:
        # On the Connection, which ends with the request: the error keeps its frames alive.
        connection.dbsession_spoiled = transaction, error  # type: ignore[attr-defined]
        # SQLAlchemy 2.0 refuses listeners of isolate()'s connections, which ask by themselves.
        with contextlib.suppress(InvalidRequestError):
            for name in ("commit", "prepare_twophase"):  # of the application, too
                event.listen(connection, name, check_commit)


def check_commit(connection: Connection, *_: object) -> None:
    """Raise if the transaction cannot be committed any more, whoever commits it."""
    # Outside of scopes a Session is plain SQLAlchemy.
    if active_step() is not None and (error := refusal(connection, driver_of(connection))):
        raise error


def refusal(connection: Connection, driver: Any) -> PendingRollbackError | None:
    """Return why the connection's transaction cannot be committed any more, or only a part of it.

    After a failed statement, PostgreSQL answers COMMIT with ROLLBACK, and psycopg and psycopg2 do
    not report it: an error that the application caught would turn into a success that saved
    nothing. After a deadlock, MariaDB has rolled back and begun anew.
    """
    error, aborted = spoiler(connection), is_aborted(driver)
    # The application's own ROLLBACK TO SAVEPOINT may have revived it.
    is_alive = error is None or (aborted is False and not is_autocommit(connection))
    return None if is_alive and not aborted else explain_refusal(error)


def explain_refusal(error: BaseException | None = None) -> PendingRollbackError:
    """Return the error of a commit that is refused.

    :param error: of the statement that failed, if it is known.
    """
    what = "" if error is None else f" ({type(error).__name__}: {error})"
    refused = PendingRollbackError(
        "cannot commit: a statement failed in this transaction, the database has rolled it back, "
        f"and the application caught the error{what}. Put the statement that may fail into "
        "`with Session.begin_nested():`. (Session.rollback() where the error is caught also ends "
        "the failed transaction, but discards what the request has done before.)"
    )
    refused.__cause__ = error
    return refused


def _on_error(context: ExceptionContext) -> None:
    """Record what the error means for the transaction: a later COMMIT does not report it."""
    connection, error = context.connection, context.original_exception
    if connection is None or connection.invalidated:
        return
    dialect = dialect_names(connection)
    if not isinstance(error, connection.dialect.loaded_dbapi.Error):
        # Raised into the driver in mid-statement (`gevent.Timeout(s, AnExceptionClass)`): the
        # answer is still on its way, and the next statement would read it. SQLite has no wire.
        if passed_through(error, "do_") and "SQLiteDialect" not in dialect:
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        return
    transaction = connection.get_transaction()
    if transaction is None or is_autocommit(connection):
        return
    driver = driver_of(connection)
    found = set(codes(error))
    if "SQLiteDialect" in dialect:
        # INSERT OR ROLLBACK, a full disk: it has ended the transaction, with what was in it.
        ended = not driver.in_transaction
        spoiled = ended and driver.total_changes != connection.info.get(CHANGES)
        level, mode = (getattr(driver, name, ...) for name in ("isolation_level", "autocommit"))
        if ended and (level is None or mode is False):
            # sqlite3 does not begin another one, and each later statement would commit itself.
            with contextlib.suppress(connection.dialect.loaded_dbapi.Error):
                ask(connection, "BEGIN")
    elif "MySQLDialect" in dialect:
        spoiled = not found.isdisjoint(_ROLLED_BACK) or (
            _LOCK_TIMEOUT in found and ask(connection, _ROLLS_BACK_ON_TIMEOUT)[0]
        )
    else:
        spoiled = is_aborted(driver)
    if spoiled:
        spoil(connection, error)


event.listen(Engine, "handle_error", _on_error)
