"""The outer transaction of an isolation, its connection and its state."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, func, select
from sqlalchemy.pool import SingletonThreadPool

from wsgi_dbsession._driver import is_aborted

if TYPE_CHECKING:
    from sqlalchemy import Engine

# libpq's PQTRANS_IDLE, which psycopg and psycopg2 expose, and the status byte of PostgreSQL's
# protocol, which pg8000 stores.
_IDLE = (0, b"I")

# A flag of MySQL's protocol, which PyMySQL stores.
_SERVER_STATUS_IN_TRANS = 1

# By default, sqlite3 begins only before an INSERT, UPDATE or DELETE, and a savepoint before that
# would be a transaction itself. See "Transactions with SQLite and the sqlite3 driver" in
# SQLAlchemy's documentation. MySQL begins at the first access to a table.
_BEGIN_LATE = ("sqlite", "mysql", "mariadb")

_SETTING = "wsgi_dbsession.isolation"
# If rows are not counted: each savepoint that has written or locked a row has such a lock.
_ROWS_WRITTEN = """
    SELECT CASE WHEN current_setting('track_counts') = 'on' THEN (
        SELECT sum(
            pg_stat_get_xact_tuples_inserted(oid) + pg_stat_get_xact_tuples_updated(oid)
            + pg_stat_get_xact_tuples_deleted(oid)
        )
        FROM pg_class WHERE relkind IN ('r', 'm', 't')
    ) ELSE (
        SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'transactionid'
    ) END
"""


class OuterTransaction:
    """A transaction that is never committed."""

    def __init__(self, engine: Engine) -> None:
        # Without events, so that the isolation's own statements and its BEGIN call no listener.
        self.connection = Connection(engine, _has_events=False)
        self._began = False
        self._pid = os.getpid()
        self._thread = threading.get_ident()

    def begin(self) -> None:
        """Begin the transaction."""
        connection = self.connection
        self._dialect = connection.dialect.name
        driver: Any = connection.connection.dbapi_connection
        self.driver = driver
        is_sqlite = self._dialect == "sqlite"
        if not is_sqlite and getattr(self.driver, "autocommit", False) is True:
            connection.execution_options(isolation_level=connection.default_isolation_level)
        connection.begin()
        self._began = self._dialect in _BEGIN_LATE and self.has_ended()
        if self._began:
            connection.exec_driver_sql("BEGIN")
        # A COMMIT keeps this setting and a ROLLBACK undoes it, see was_committed().
        if is_sqlite:
            connection.exec_driver_sql("PRAGMA temp.user_version = 1")
        elif self._dialect == "postgresql":
            self._token = uuid.uuid4().hex
            connection.execute(select(func.pg_catalog.set_config(_SETTING, self._token, False)))

    def is_inherited(self) -> bool:
        """Return whether the parent process began it."""
        return os.getpid() != self._pid

    def check_place(self) -> None:
        """Raise if this process or thread must not use the connection."""
        if self.is_inherited():
            msg = (
                "a forked process must not use the connection of its parent's isolation: begin an "
                "isolation in the child"
            )
            raise RuntimeError(msg)
        if threading.get_ident() != self._thread and isinstance(
            self.connection.engine.pool, SingletonThreadPool
        ):
            msg = (
                "each thread has its own in-memory SQLite database: share one by "
                'create_engine("sqlite://", poolclass=StaticPool, '
                'connect_args={"check_same_thread": False})'
            )
            raise RuntimeError(msg)

    def has_ended(self) -> bool:
        """Return whether the driver reports that no transaction is open. False if unknown."""
        driver = self.driver
        if (status := _libpq_status(driver)) is not None:
            return status in _IDLE
        if self._dialect == "sqlite":
            return not driver.in_transaction
        server_status = getattr(driver, "server_status", None)
        return isinstance(server_status, int) and not server_status & _SERVER_STATUS_IN_TRANS

    def is_aborted(self) -> bool:
        """Return whether PostgreSQL accepts only a rollback, after a failed statement."""
        return bool(is_aborted(self.driver))

    @property
    def counts_rows(self) -> bool:
        """Whether rows_written() returns a number."""
        return self._dialect in ("sqlite", "postgresql")

    def rows_written(self) -> int | None:
        """Return a number that grows with each row that is written. None if not supported."""
        if self._dialect == "sqlite":
            written: int = self.driver.total_changes
            return written
        if self._dialect == "postgresql":
            return self.connection.exec_driver_sql(_ROWS_WRITTEN).scalar()
        return None

    def was_committed(self) -> bool | None:
        """Return whether the transaction, which has ended, was committed. None if unknown."""
        with contextlib.suppress(Exception):
            self.driver.rollback()  # undoes what followed
            if self._dialect == "sqlite":
                read = self.connection.exec_driver_sql
                committed = read("PRAGMA temp.user_version").scalar() == 1
                read("PRAGMA temp.user_version = 0")
                return committed
            if self._dialect == "postgresql":
                setting = func.pg_catalog.current_setting(_SETTING, True)
                return self.connection.scalar(select(setting)) == self._token
        return None

    def end(self) -> None:
        """Roll back, and return the connection to its pool."""
        try:
            if self._began and not self.has_ended():
                self.connection.exec_driver_sql("ROLLBACK")
        finally:
            self.connection.close()

    def discard(self) -> None:
        """Roll back, and discard the connection."""
        # An in-memory SQLite database is lost with its connection.
        if self._dialect == "sqlite":
            self.end()
        else:
            self.connection.invalidate()
            self.connection.close()


def _libpq_status(driver: Any) -> object:
    found: object = getattr(getattr(driver, "info", None), "transaction_status", None)
    return getattr(driver, "_transaction_status", None) if found is None else found
