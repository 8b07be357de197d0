"""What drivers and their errors reveal about a transaction.

SQLAlchemy has no common API for it, so what differs between the drivers is here, and only here.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine
    from sqlalchemy.pool import ConnectionPoolEntry

READ_ONLY = "wsgi_dbsession_read_only"
"""The execution option of an engine whose server refuses all writes."""

_INERROR = 3  # PQTRANS_INERROR of libpq, as psycopg and psycopg2 show it

# Keys of `Connection.info`, which lives as long as the driver's connection does.
CHANGES = "wsgi_dbsession.changes"
_USER = "wsgi_dbsession.user"

# The answer to a COMMIT that leaves open whether it took place: connection exceptions, an operator
# who ended the server's process, "statement completion unknown", and a node of Galera that lost
# its cluster.
_OPEN = ("08", "57P", "40003", "1180", "1047")

# Every write takes a transaction ID, and so does a read that locks rows (FOR UPDATE). A write
# locks its table in a stronger mode, until its savepoint is rolled back; where rows alone are
# locked, it is unknown. A sequence stays locked, and goes on whatever is rolled back.
_POSTGRESQL = """
    SELECT pg_current_xact_id_if_assigned() IS NOT NULL,
        bool_or(mode NOT IN ('AccessShareLock', 'RowShareLock')), bool_or(mode = 'RowShareLock')
    FROM pg_locks LEFT JOIN pg_class ON pg_class.oid = relation
    WHERE pid = pg_backend_pid() AND locktype = 'relation' AND relkind IS DISTINCT FROM 'S'
"""
# Needs the privilege PROCESS. No table has it: information_schema.innodb_trx is as old as the
# last look that anyone took at it, up to 0.1 s, so that a write is missing, or an earlier
# transaction of the same connection is there.
_INNODB = "SHOW ENGINE INNODB STATUS"


def codes(error: BaseException) -> Iterator[str]:
    """Return the codes of a database error, wherever its driver keeps them.

    :param error: an exception of SQLAlchemy, or of the driver.
    """
    original: Any = error.orig if isinstance(error, DBAPIError) else error
    # psycopg, asyncpg and mysql-connector; psycopg2
    for name in ("sqlstate", "pgcode"):
        code = getattr(original, name, None)
        if isinstance(code, str):
            yield code
    # PEP 249 gives the class of database errors its name. An OSError has a number too.
    if not original.args or "DatabaseError" not in _names(original):
        return
    first = original.args[0]
    if isinstance(first, int):  # PyMySQL, mysqlclient, mysql-connector, pymssql
        yield str(first)
    elif isinstance(first, str):  # pyodbc
        yield first[:5]
    elif isinstance(first, dict):  # pg8000
        yield str(cast("dict[str, str]", first).get("C"))
    elif isinstance(getattr(first, "code", None), int):  # oracledb, cx_Oracle
        yield f"ORA-{first.code:05}"


def is_refusal(error: BaseException) -> bool:
    """Return whether this error of a COMMIT is the database's answer, and not a lost one."""
    return (
        isinstance(error, DBAPIError)
        and not error.connection_invalidated
        and not _leaves_open(error)
    )


def _leaves_open(error: BaseException) -> bool:
    return any(code.startswith(_OPEN) for code in codes(error))


def is_aborted(driver: Any) -> bool | None:
    """Return whether PostgreSQL has aborted the transaction, and accepts only a rollback.

    Whatever speaks its protocol does the same, under any dialect's name.

    :param driver: the driver's connection.
    :return: None if the driver does not show it.
    """
    pgconn = getattr(driver, "pgconn", None)  # psycopg; its `info` is much slower
    if pgconn is None:
        pgconn = getattr(driver, "info", None)  # psycopg2
    status = getattr(pgconn, "transaction_status", None)
    if status is None:
        # pg8000 has no public name.
        status = getattr(driver, "_transaction_status", None)
        return None if status is None else bool(status == b"E")
    return bool(status == _INERROR)


def is_autocommit(connection: Connection) -> bool:
    """Return whether the statements of this connection commit by themselves."""
    options = connection.get_execution_options()
    level = options.get("isolation_level")
    if level is None:
        # What create_engine(isolation_level=...) was given; the public ways ask the server.
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    if level not in (None, "AUTOCOMMIT"):
        return False
    if connection.closed or connection.invalidated:
        return level is not None
    driver = driver_of(connection)
    if not hasattr(driver, "total_changes"):
        return level is not None or autocommits(driver)
    # SQLite: with isolation_level=None, which AUTOCOMMIT sets too, sqlite3 does not begin a
    # transaction, but the listener of SQLAlchemy's recipe does.
    return autocommits(driver) or (
        getattr(driver, "isolation_level", "") is None
        and getattr(driver, "autocommit", None) is not False
        and not driver.in_transaction  # that the application has begun by a statement
        and not connection.dispatch.begin
    )


def autocommits(driver: Any) -> bool:
    """Return whether the driver is in autocommit mode, whatever SQLAlchemy assumes."""
    try:
        ask = getattr(driver, "get_autocommit", None)
        if ask is not None:  # PyMySQL, mysqlclient
            return bool(ask())
        # psycopg, psycopg2, pg8000, pyodbc, oracledb
        return getattr(driver, "autocommit", False) is True
    except Exception:  # it is closed
        return False


def is_read_only(source: Connection | Engine) -> bool:
    """Return whether the server refuses all writes of an engine, or of its connection.

    ``wsgi_dbsession.replica`` makes such engines, and marks them with this execution option.
    """
    return bool(source.get_execution_options().get(READ_ONLY))


def has_written(connection: Connection, *, undone: bool = False) -> bool | None:
    """Return whether the connection's transaction has written something, None if unknown.

    It may cost a round trip, and does not disturb the transaction.
    A subclass of ``Connection`` that shares one transaction with others has a ``has_written()``.

    :param undone: whether a savepoint of it was rolled back, perhaps with all that was written.
    """
    own = getattr(connection, "has_written", None)
    if own is not None:
        return bool(own())
    if is_autocommit(connection):
        # What was written is kept, but what a read-only server has refused is lost.
        return bool(spoiler(connection))
    if connection.closed or connection.invalidated or driver_of(connection) is None:
        return None  # and has been rolled back
    if not connection.in_transaction():
        return False
    driver = driver_of(connection)
    counted = None if undone else True  # the counts include what was rolled back
    if hasattr(driver, "total_changes"):  # SQLite
        changes = connection.info.get(CHANGES)
        return bool(driver.in_transaction and driver.total_changes != changes) and counted
    names, dialect = dialect_names(connection), connection.dialect
    try:
        # An older server, or one that claims to be, has no such function, and calling it would
        # abort the transaction.
        version: Any = dialect.server_version_info or ()
        if "PGDialect" in names and version >= (13,):
            has_id, writes, locks_rows = ask(connection, _POSTGRESQL)
            if not has_id or writes:
                return bool(has_id)
            return None if locks_rows else counted
        if "MySQLDialect" in names:
            return _has_written_innodb(connection) and counted
    except dialect.loaded_dbapi.Error as error:
        # The connection is lost, and no statement has reported it: COMMIT would have failed.
        if _leaves_open(error) or dialect.is_disconnect(error, driver, None):
            return True
    return None


def _has_written_innodb(connection: Connection) -> bool | None:
    number = ask(connection, "SELECT CONNECTION_ID()")[0]
    status = ask(connection, _INNODB) or [""]  # a server without InnoDB
    for each in status[-1].split("\n---TRANSACTION ")[1:]:
        head, mine, _ = each.partition(f" thread id {number}, ")
        if mine:
            return "undo log entries" in head
    return None  # the list is cut after a megabyte


def ask(connection: Connection, statement: str) -> Any:
    # The driver's own cursor: no listener of the application must notice this.
    try:
        with contextlib.closing(driver_of(connection).cursor()) as cursor:
            cursor.execute(statement)
            return cursor.fetchone()
    except BaseException as error:
        if not isinstance(error, connection.dialect.loaded_dbapi.Error):
            connection.invalidate()  # the answer is still on its way, see _on_error()
        raise


def spoiler(connection: Connection) -> BaseException | None:
    """Return the error with which the database ended or aborted the transaction by itself."""
    spoiled, error = getattr(connection, "dbsession_spoiled", (None, None))
    return None if spoiled is not connection.get_transaction() else error


def passed_through(error: BaseException, *prefixes: str) -> bool:
    """Return whether this error came out of a method of the dialect, such as ``do_commit``."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name.startswith(prefixes):
            return True
        traceback = traceback.tb_next
    return False


def driver_of(connection: Connection) -> Any:
    return connection.connection.dbapi_connection


def _names(instance: object) -> list[str]:
    return [each.__name__ for each in type(instance).__mro__]


def dialect_names(connection: Connection) -> list[str]:
    # CockroachDB's dialect is a PGDialect, MariaDB's a MySQLDialect. Names need no import.
    return _names(connection.dialect)


def _on_checkout(driver: Any, record: ConnectionPoolEntry, proxy: Any) -> None:
    """Store how many rows this connection of SQLite has changed so far."""
    changes = getattr(driver, "total_changes", None)
    if changes is None:
        return
    # A StaticPool checks the same connection out twice, even in mid-transaction.
    if driver.in_transaction:
        if getattr(driver, "autocommit", None) is not False:
            return
        # With this setting, new in Python 3.12, sqlite3 is always in a transaction.
        user = record.info.get(_USER)
        if user is not None and (other := user()) is not None and other.is_valid:
            return
        record.info[_USER] = weakref.ref(proxy)
    record.info[CHANGES] = changes


event.listen(Pool, "checkout", _on_checkout)
