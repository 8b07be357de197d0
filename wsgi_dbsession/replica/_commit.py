"""COMMIT and the position after it, without an extra round trip if the driver allows it."""

from __future__ import annotations

import contextlib
import secrets
import sys
from typing import TYPE_CHECKING, Any

from wsgi_dbsession._driver import is_aborted

from ._position import NOWHERE, Position

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Engine

_IDLE = 0  # PQTRANS_IDLE of libpq

_BEFORE = "SELECT current_setting('synchronous_commit'), pg_current_xact_id_if_assigned()::text"
# Returns no row on a standby, where these functions fail. The primary's address may lead to one.
_AFTER = """SELECT pg_current_wal_flush_lsn()::text, pg_current_wal_insert_lsn()::text,
 left(pg_walfile_name(pg_current_wal_flush_lsn()), 8) WHERE NOT pg_is_in_recovery()"""

# All in one message. A setting of the session keeps what is known only before COMMIT. A failed
# COMMIT reverts it. So after an error it shows whether COMMIT or a later statement has failed.
_SETTING = "wsgi_dbsession.commit"
_BATCH = f"""SELECT set_config('{_SETTING}', concat_ws(' ', '%s',
 current_setting('synchronous_commit'), pg_current_xact_id_if_assigned()::text), false); COMMIT; %s
 SELECT current_setting('{_SETTING}'), position.* FROM (SELECT) one LEFT JOIN ({_AFTER}) position
 ON true"""
_WHICH = f"SELECT current_setting('{_SETTING}', true)"


class Commit:
    """Commits the transactions of one engine, and returns the database's position afterwards.

    :param engine: the engine of the primary.
    :raises ValueError: it is not PostgreSQL with one of the supported drivers.
    """

    def __init__(self, engine: Engine) -> None:
        rows: dict[str, Callable[[Any, str], Sequence[Any]]] = {
            "psycopg": self._psycopg,
            "psycopg2": self._psycopg2,
            "pg8000": _pg8000,
        }
        dialect = engine.dialect
        if dialect.name != "postgresql" or dialect.driver not in rows:
            msg = (
                "primary must be an engine of PostgreSQL with psycopg, psycopg2 or pg8000, got "
                f"{engine!r}. Make it by create_engine('postgresql+psycopg://...')."
            )
            raise ValueError(msg)
        dbapi: Any = dialect.dbapi
        if dialect.driver == "psycopg" and not dbapi.Pipeline.is_supported():
            msg = (
                "psycopg must have libpq 14 or later, got "
                f"{dbapi.pq.version()}. Install psycopg[binary]."
            )
            raise ValueError(msg)
        self._dbapi = dbapi
        self._pipelines = dialect.driver == "psycopg"
        # psycopg2 assumes that the transaction is still open, so this opens one for its commit().
        self._begin = "BEGIN READ ONLY;" if dialect.driver == "psycopg2" else ""
        self._row = rows[dialect.driver]

    def __call__(self, driver: Any, commit: Callable[[], None]) -> Position | None:
        """Commit.

        :param driver: the driver's connection.
        :param commit: commits as the dialect does, without a position.
        :return: the position, None if the transaction has written nothing, or
            :data:`NOWHERE` if it may have written and the position is unknown.
        :raises BaseException: COMMIT failed or was interrupted, for example by gevent's Timeout.
            A later statement that fails does not raise.
        """
        if driver.autocommit:
            commit()
            with contextlib.suppress(self._dbapi.Error):
                return self.at_autocommit(driver)
            return NOWHERE
        if _is_idle(driver) or is_aborted(driver):
            commit()
            return None
        return self._in_pipeline(driver) if self._pipelines else self._in_batch(driver)

    def at_autocommit(self, driver: Any) -> Position:
        """Return the current position, after statements at AUTOCOMMIT that may have written.

        :param driver: the driver's connection.
        :return: the position, or :data:`NOWHERE` on a standby.
        :raises BaseException: the query failed or was interrupted.
        """
        return _read("off", self._row(driver, _AFTER))

    def _in_pipeline(self, driver: Any) -> Position | None:
        before, commit, after = (self._cursor(driver) for _ in range(3))
        handled = sys.exc_info()[1]
        try:
            with driver.pipeline():
                before.execute(_BEFORE, prepare=False)
                commit.execute("COMMIT", prepare=False)
                after.execute(_AFTER, prepare=False)
        except self._dbapi.Error as error:
            hidden = error.__context__
            if hidden is not handled and not isinstance(hidden, self._dbapi.Error | None):
                # psycopg fails to leave the pipeline after an interruption, and hides that.
                raise hidden from None
            if commit.statusmessage != "COMMIT":
                raise
            return NOWHERE
        return _position(before.fetchone(), after.fetchone())

    def _in_batch(self, driver: Any) -> Position | None:
        token = secrets.token_hex(8)
        try:
            known, *after = self._row(driver, _BATCH % (token, self._begin))
        except self._dbapi.Error:
            if not self._has_committed(driver, token):
                raise
            return NOWHERE
        if self._begin:
            with contextlib.suppress(self._dbapi.Error):  # the pool discards a lost connection
                driver.commit()
        return _position(known.split()[1:], after)

    def _has_committed(self, driver: Any, token: str) -> bool:
        with contextlib.suppress(self._dbapi.Error):
            driver.rollback()  # psycopg2 may be in the transaction that self._begin has opened
            (known,) = self._row(driver, _WHICH)
            driver.rollback()
            return bool(known) and known.split()[0] == token
        return False

    def _cursor(self, driver: Any) -> Any:
        # Independent of the connection's cursor_factory and row_factory.
        return self._dbapi.Cursor(driver, row_factory=self._dbapi.rows.tuple_row)

    def _psycopg(self, driver: Any, statement: str) -> Sequence[Any]:
        row: Sequence[Any] = self._cursor(driver).execute(statement).fetchone()
        return row

    def _psycopg2(self, driver: Any, statement: str) -> Sequence[Any]:
        with driver.cursor(cursor_factory=self._dbapi.extensions.cursor) as cursor:
            cursor.execute(statement)
            row: Sequence[Any] = cursor.fetchone()
            return row


def _pg8000(driver: Any, statement: str) -> Any:
    rows = driver.execute_simple(statement).rows
    return rows[-1] if rows else None


def _position(before: Sequence[Any], after: Sequence[Any] | None) -> Position | None:
    synchronous, xid = (*before, None)[:2]
    return None if xid is None else _read(synchronous, after)


def _read(synchronous: str | None, after: Sequence[Any] | None) -> Position:
    if after is None or after[0] is None:
        return NOWHERE
    flushed, inserted, timeline = after
    # With "off", COMMIT may return before its record is flushed.
    return Position.read(int(timeline, 16), inserted if synchronous == "off" else flushed)


def _is_idle(driver: Any) -> bool:
    connection = getattr(driver, "pgconn", None) or getattr(driver, "info", None)
    return getattr(connection, "transaction_status", None) == _IDLE
