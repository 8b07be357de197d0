"""Which errors of a database are retryable."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError, PendingRollbackError

from wsgi_dbsession._driver import codes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy.engine import ExceptionContext

RETRYABLE_CODES: Mapping[str, str] = MappingProxyType(
    {
        "40001": "serialization failure: standard SQL; a deadlock in SQL Server through ODBC",
        "40P01": "deadlock: PostgreSQL, YugabyteDB",
        "1213": "deadlock, or a conflict between the nodes of Galera: MySQL, MariaDB",
        "1205": "lock wait timeout: MySQL, MariaDB; deadlock: SQL Server",
        "1020": "the row has changed since it was read: MariaDB with innodb_snapshot_isolation",
        "ORA-00060": "deadlock: Oracle",
        "ORA-08177": "serialization failure: Oracle",
    }
)
"""The codes with which a database reports that nothing was committed, and what they mean.

Another attempt at the transaction may succeed.
"""

# After an error, PostgreSQL refuses each statement until a rollback.
_IN_FAILED_TRANSACTION = "25P02"

# A deadlock ends the transaction in MySQL and MariaDB, and its savepoints with it. The subsequent
# rollback to a savepoint fails.
_NO_SAVEPOINT = "1305"

# If the connection is lost during one of these, the transaction may be committed: now, or later
# when a prepared transaction is resolved.
_COMMITS = ("COMMIT", "END", "PREPARE TRANSACTION", "XA ")


def is_lost_connection(error: BaseException) -> bool:
    """Return whether SQLAlchemy found the connection dead when it sent a statement."""
    return (
        isinstance(error, DBAPIError)
        and error.connection_invalidated
        and error.statement is not None
    )


def is_consequence(error: BaseException) -> bool:
    """Return whether an earlier error, which no rollback followed, has caused this one."""
    if isinstance(error, PendingRollbackError):
        return True
    found = list(codes(error))
    return _IN_FAILED_TRANSACTION in found or (
        _NO_SAVEPOINT in found and "SAVEPOINT" in str(error)
    )


def is_lost_commit(context: ExceptionContext) -> bool:
    """Return whether the connection was lost in a statement that commits or prepares a commit."""
    statement = context.statement
    return (
        context.is_disconnect
        and statement is not None
        and statement.lstrip().upper().startswith(_COMMITS)
    )


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Return an error and the chain of its causes or contexts."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def describe_error(error: BaseException) -> str:
    """Return the name of an error's class and, if it is retryable, its code, for log lines."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig else error
    found = list(codes(error))
    what = next((code for code in found if code in RETRYABLE_CODES), None)
    if what is None and is_lost_connection(error):
        what = "connection lost"
    return type(original).__name__ + (f" ({what})" if what else "")
