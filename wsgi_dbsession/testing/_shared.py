"""The connection that all Sessions share: one transaction outside, a savepoint for each of theirs.

It is what "Joining a Session into an External Transaction" in SQLAlchemy's documentation does with
``join_transaction_mode="create_savepoint"``, for Sessions that end in any order: there, each has
to end before the one that began before it does. So each Session gets a Connection of its own, on
the same connection of the driver, and what it takes for a transaction is a savepoint here.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import threading
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, exc
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.pool import SingletonThreadPool

from wsgi_dbsession._place import application_line
from wsgi_dbsession._report import log

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sqlalchemy import Engine, RootTransaction, TwoPhaseTransaction

_INERROR = 3  # PQTRANS_INERROR of libpq, as psycopg and psycopg2 show it

# What belongs to a transaction from its begin: the outer one has begun already.
_FIXED = ("isolation_level", "postgresql_readonly", "postgresql_deferrable")

_READS = re.compile(r"\s*(?:SELECT|SHOW|EXPLAIN|VALUES|PRAGMA)\b", re.IGNORECASE)
_ENDS = re.compile(
    r"\s*(?:COMMIT|END|ABORT|PREPARE\s+TRANSACTION|ROLLBACK(?!\s+(?:\w+\s+)?TO\b))\b",
    re.IGNORECASE,
)

_DEFERRABLE = """
    SELECT quote_ident(nspname) || '.' || quote_ident(conname), condeferred
    FROM pg_constraint JOIN pg_namespace ON pg_namespace.oid = connamespace WHERE condeferrable
"""
_DEFERRED_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%DEFERRED%'"


class _Savepoint:
    """A savepoint, and who wrote after it was set and before the next one was."""

    __slots__ = ("ended", "failed", "name", "owner", "writers")

    def __init__(self, name: str, owner: IsolatedConnection | None) -> None:
        self.name = name
        self.owner = owner  # None: a nested isolation
        self.writers: set[IsolatedConnection] = set()
        self.ended = False
        self.failed = False


class _Thread(threading.local):
    """What a thread is at."""

    worker: object = None


class SharedConnection:
    """One connection of an engine, in a transaction that is never committed.

    The transactions in it are those of one thread at a time: another thread waits for its turn.
    """

    def __init__(self, engine: Engine, wait: float) -> None:
        self.problems: list[str] = []
        self._wait = wait
        self._turn = threading.Condition()
        self._thread = threading.get_ident()
        self._pid = os.getpid()
        self._driver: Any = None
        self._gone: str | None = None  # why it cannot be used any more
        self._numbers = itertools.count(1)
        self._savepoints: list[_Savepoint] = []
        self._open: list[IsolatedConnection] = []
        self._here = _Thread()
        self._late: list[Callable[[], None]] = []
        # Without events, so that listeners see neither our statements nor a second BEGIN.
        self._connection = Connection(engine, _has_events=False)
        try:
            self._begin()
            self._violations = self._find_violations()
        except BaseException:
            self._connection.close()
            raise

    def _begin(self) -> None:
        connection = self._connection
        self._dialect = connection.dialect
        self._driver = connection.connection.dbapi_connection
        self._sqlite = self._dialect.name == "sqlite"
        if not self._sqlite and getattr(self._driver, "autocommit", False) is True:
            connection.execution_options(isolation_level=connection.default_isolation_level)
        connection.begin()
        self._began = self._sqlite and not self._driver.in_transaction
        if self._began:
            # Left to itself, sqlite3 begins before the first INSERT, UPDATE or DELETE: a savepoint
            # before that would be a transaction of its own. See "Transactions with SQLite and the
            # sqlite3 driver" in SQLAlchemy's documentation.
            connection.exec_driver_sql("BEGIN")

    @contextlib.contextmanager
    def working(self, worker: object) -> Generator[None]:
        """Use the driver's connection. What the collector rolls back meanwhile has to wait.

        It may close a forgotten response in the midst of a statement on this same connection.
        """
        here = self._here
        if here.worker is not None:  # a listener's statement, in that of which it is told
            yield
            return
        here.worker = worker
        try:
            yield
        finally:
            try:
                while self._late:
                    with self._turn:
                        self._late.pop(0)()
            finally:
                here.worker = None

    def end(self) -> None:
        """Roll everything back, and give the connection back to its pool."""
        with self._turn, self.working(self):
            self._gone = "the isolation in which this transaction began is over"
            for connection in self.unended(None):
                self._leave(connection)
            self._savepoints.clear()
            try:
                if self._began and self._driver.in_transaction:
                    self._connection.exec_driver_sql("ROLLBACK")
            finally:
                self._connection.close()

    # -- a nested isolation -----------------------------------------------------------------------

    def open_level(self) -> _Savepoint:
        """Begin an isolation in the isolation."""
        with self._turn, self.working(self):
            self._check()
            return self._set(None)

    def close_level(self, level: _Savepoint) -> None:
        """Roll back what was done since."""
        with self._turn, self.working(self):
            for connection in self.unended(level):
                connection.undone = "the isolation in which this transaction began is over"
                self._leave(connection)
            if self._gone is None:
                self._undo(level)
                self._end(level)

    def unended(self, level: _Savepoint | None) -> list[IsolatedConnection]:
        """Return who is in a transaction that began in this level and has not ended."""
        with self._turn:
            if level is None:
                return list(self._open)
            if level not in self._savepoints:
                return []
            inner = self._savepoints[self._savepoints.index(level) :]
            return [each for each in self._open if each.began in inner]

    # -- what Connections ask for -----------------------------------------------------------------

    def driver_connection(self) -> Any:
        """Return the pool's connection.

        :raises RuntimeError: it cannot be used here, or not any more.
        """
        self._check()
        return self._connection.connection

    def begin(self, connection: IsolatedConnection) -> _Savepoint:
        """Begin a transaction, as soon as those of other threads have ended."""
        with self._turn, self.working(connection):
            self._await_turn()
            self._check()
            if self._failed():
                # PostgreSQL takes nothing but a rollback now, and it is sure to come.
                self._undo(self._savepoints[-1])
                self._savepoints[-1].failed = True
            savepoint = self._set(connection)
            self._open.append(connection)
            return savepoint

    def prepare(self, connection: IsolatedConnection) -> None:
        """Fail now if a commit would fail."""
        with self._turn, self.working(connection):
            self.check(connection)
            self._check_deferred(connection)

    def commit(self, connection: IsolatedConnection, *, prepared: bool) -> None:
        """Commit, or roll back and raise."""
        with self._turn, self.working(connection):
            try:
                self.check(connection)
                if not prepared:
                    self._check_deferred(connection)
            except BaseException:
                self._roll_back(connection)
                raise
            for savepoint in self._savepoints:
                if savepoint.owner is connection:
                    savepoint.ended = True
            self._release_ended()
            self._leave(connection)

    def rollback(self, connection: IsolatedConnection) -> None:
        """Roll back, now or after the statement that this thread is in the midst of."""
        if self._here.worker not in (None, connection):
            self._late.append(functools.partial(self._roll_back, connection))
            return
        with self._turn, self.working(connection):
            self._roll_back(connection)

    def set_savepoint(self, connection: IsolatedConnection) -> _Savepoint:
        """Set a savepoint of the application's own."""
        with self._turn, self.working(connection):
            self.check(connection)
            return self._set(connection)

    def release_savepoint(self, savepoint: _Savepoint) -> None:
        """Release a savepoint of the application's own."""
        with self._turn, self.working(savepoint.owner):
            assert savepoint.owner is not None
            self.check(savepoint.owner)
            self._end(savepoint)

    def rollback_savepoint(self, savepoint: _Savepoint) -> None:
        """Undo what its owner did since; see :meth:`rollback`."""
        if self._here.worker not in (None, savepoint.owner):
            self._late.append(functools.partial(self._roll_back_to, savepoint))
            return
        with self._turn, self.working(savepoint.owner):
            self._roll_back_to(savepoint)

    def check(self, connection: IsolatedConnection) -> None:
        """Raise if this transaction cannot go on."""
        self._check()
        if connection.undone is not None:
            raise RuntimeError(connection.undone)
        mine = [each for each in self._savepoints if each.owner is connection]
        if mine and mine[-1].failed:
            msg = "a statement failed in this transaction: roll it back before you go on"
            raise exc.PendingRollbackError(msg)

    def note(self, connection: IsolatedConnection, statement: Any) -> None:
        """Take note of a statement, a string or ``Compiled``, that is about to run.

        :raises RuntimeError: it must not.
        """
        with self._turn:
            connection.thread = threading.get_ident()
            self.check(connection)
            if _ENDS.match(str(statement)):
                msg = (
                    f"{str(statement).strip()!r} would end the outer transaction of the "
                    "isolation, and leave what is in it in the database: use Session.commit() "
                    "and Session.rollback()"
                )
                raise RuntimeError(msg)
            selects = getattr(getattr(statement, "statement", None), "is_select", False)
            if connection in self._open and not (selects or _READS.match(str(statement))):
                self._savepoints[-1].writers.add(connection)

    def is_open(self, connection: IsolatedConnection) -> bool:
        """Say whether it has begun a transaction that has not ended."""
        with self._turn:
            return connection in self._open

    def lose(self) -> None:
        """Remember that the connection is broken."""
        self._gone = (
            "the connection that the isolation shares was lost, and all that was done on it"
        )

    # -- transactions; call these with the lock held ----------------------------------------------

    def _check_deferred(self, connection: IsolatedConnection) -> None:
        """Fail as COMMIT would: the release of a savepoint checks no deferred constraint.

        :raises sqlalchemy.exc.IntegrityError: one is violated.
        """
        if not any(connection in each.writers for each in self._savepoints):
            return
        if self._dialect.name == "postgresql":
            found = self._connection.exec_driver_sql(_DEFERRABLE).all()
            if found:
                self._connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")
            deferred = [name for name, initially in found if initially]
            if deferred:
                # The next transaction begins with the constraints as they were declared.
                self._connection.exec_driver_sql(f"SET CONSTRAINTS {', '.join(deferred)} DEFERRED")
        elif self._find_violations() - self._violations:
            failure = self._dialect.loaded_dbapi.IntegrityError("FOREIGN KEY constraint failed")
            raise exc.IntegrityError("COMMIT", None, failure)

    def _roll_back(self, connection: IsolatedConnection) -> None:
        try:
            self._roll_back_to(connection.began)
        finally:
            self._leave(connection)

    def _roll_back_to(self, savepoint: _Savepoint) -> None:
        """Undo what its owner did since, and forget the savepoint."""
        if self._gone is not None or savepoint not in self._savepoints:
            return  # undone already, by what it lay in
        inner = self._savepoints[self._savepoints.index(savepoint) :]
        writers = set[IsolatedConnection]().union(*(each.writers for each in inner))
        if not writers or savepoint.owner in writers or self._failed():
            survivors = self._undo(savepoint)
            self._end(savepoint)
            for survivor in survivors:
                self._emit(self._dialect.do_savepoint, survivor.name)
                self._savepoints.append(survivor)
        else:
            self._end(savepoint)

    # -- savepoints; call these with the lock held ------------------------------------------------

    def _emit(self, order: Callable[[Connection, str], None], name: str) -> None:
        order(self._connection, name)

    def _set(self, owner: IsolatedConnection | None) -> _Savepoint:
        savepoint = _Savepoint(f"wsgi_dbsession_{next(self._numbers)}", owner)
        self._emit(self._dialect.do_savepoint, savepoint.name)
        self._savepoints.append(savepoint)
        return savepoint

    def _end(self, savepoint: _Savepoint) -> None:
        savepoint.ended = True
        self._release_ended()

    def _release_ended(self) -> None:
        """Release what has ended. What lies below one that has not must wait for that."""
        savepoints = self._savepoints
        while savepoints and savepoints[-1].ended:
            ended = savepoints.pop()
            self._emit(self._dialect.do_release_savepoint, ended.name)
            if savepoints:
                savepoints[-1].writers |= ended.writers
        self._move_readers()

    def _move_readers(self) -> None:
        """Let those who have only read begin anew, after what others have committed.

        Their rollback must not undo it: an open transaction of the test's own, which has read
        something, is the usual case.
        """
        savepoints = self._savepoints
        first = len(savepoints)
        writers: set[IsolatedConnection] = set()
        while first:
            below = savepoints[first - 1]
            if below.owner is None or below.failed or below.owner in writers | below.writers:
                break
            writers |= below.writers
            first -= 1
        if not writers:
            return
        movers = savepoints[first:]
        self._emit(self._dialect.do_release_savepoint, movers[0].name)
        if first:
            savepoints[first - 1].writers |= writers
        for mover in movers:
            mover.writers = set()
            self._emit(self._dialect.do_savepoint, mover.name)

    def _undo(self, savepoint: _Savepoint) -> list[_Savepoint]:
        """Undo what was done since, by whomever.

        :return: the savepoints set since whose owners have lost nothing, to be set again.
        """
        index = self._savepoints.index(savepoint)
        inner = self._savepoints[index:]
        writers = set[IsolatedConnection]().union(*(each.writers for each in inner))
        owner = savepoint.owner
        for writer in writers - {owner}:
            if writer in self._open:
                writer.undone = (
                    f"the transaction begun at {writer.opened} is undone, because it shares the "
                    "connection of the isolation with one that began before it and was rolled back"
                    f"{'' if owner is None else f': that begun at {owner.opened}'}"
                )
            elif owner is not None:
                self._report(writer, owner)
        self._emit(self._dialect.do_rollback_to_savepoint, savepoint.name)
        del self._savepoints[index + 1 :]
        savepoint.writers = set()
        savepoint.failed = False
        return [
            each
            for each in inner[1:]
            if not each.ended and each.owner is not owner and each.owner not in writers
        ]

    def _report(self, committed: IsolatedConnection, rolled_back: IsolatedConnection) -> None:
        problem = (
            f"the transaction begun at {rolled_back.opened} wrote something and was rolled back. "
            f"That has undone what the one begun at {committed.opened} had committed meanwhile, "
            "because in the isolation both share one connection. In production it stays: run this "
            "test without isolation, see docs/testing.md"
        )
        if problem not in self.problems:
            self.problems.append(problem)
            log.error("%s", problem)

    # -- state; call these with the lock held -----------------------------------------------------

    def _leave(self, connection: IsolatedConnection) -> None:
        if connection in self._open:
            self._open.remove(connection)
            self._turn.notify_all()

    def _others(self) -> list[IsolatedConnection]:
        me = threading.get_ident()
        return [each for each in self._open if each.thread != me]

    def _await_turn(self) -> None:
        if not self._turn.wait_for(lambda: not self._others(), self._wait):
            other = self._others()[0]
            msg = (
                f"waited {self._wait:g} s for the end of another thread's transaction, which was "
                f"begun at {other.opened}. In the isolation all threads share one connection, so "
                "their transactions take turns. If the test itself holds it open while it waits "
                "for a request in another thread: end it first, by Session.commit(), or put it "
                "into a `with session_scope(Session):` block of its own"
            )
            raise RuntimeError(msg)

    def _check(self) -> None:
        if self._connection.invalidated:
            self.lose()
        if self._gone is not None:
            raise RuntimeError(self._gone)
        if os.getpid() != self._pid:
            msg = "a forked process cannot use the isolation, which is its parent's connection"
            raise RuntimeError(msg)
        if (
            threading.get_ident() != self._thread
            and self._sqlite
            and isinstance(self._connection.engine.pool, SingletonThreadPool)
        ):
            msg = (
                "this is an in-memory SQLite database, of which every thread has one of its own: "
                'share it by create_engine("sqlite://", poolclass=StaticPool, '
                'connect_args={"check_same_thread": False})'
            )
            raise RuntimeError(msg)
        if self._sqlite and not self._driver.in_transaction:
            self._gone = "SQLite has rolled back the outer transaction of the isolation"
            raise RuntimeError(self._gone)

    def _failed(self) -> bool:
        info = getattr(self._driver, "info", None)
        return getattr(info, "transaction_status", None) == _INERROR

    def _find_violations(self) -> set[tuple[Any, ...]]:
        """Return the rows of SQLite that violate a foreign key that only COMMIT checks."""
        found: set[tuple[Any, ...]] = set()
        if self._sqlite and self._connection.exec_driver_sql("PRAGMA foreign_keys").scalar():
            for (table,) in self._connection.exec_driver_sql(_DEFERRED_TABLES).all():
                quoted = table.replace('"', '""')
                rows = self._connection.exec_driver_sql(f'PRAGMA foreign_key_check("{quoted}")')
                found.update(tuple(row) for row in rows)
        return found


class IsolatedEngine(OptionEngine):
    """What a registry is bound to: the engine's options and listeners, the shared connection."""

    def __init__(
        self, engine: Engine, shared: SharedConnection, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(engine, options or {})
        self.shared = shared

    def connect(self) -> Connection:
        """Return a Connection whose transactions are savepoints."""
        return IsolatedConnection(self)

    def execution_options(self, **opt: Any) -> IsolatedEngine:
        """Return an engine with other options, on the same shared connection."""
        return IsolatedEngine(self, self.shared, _without_fixed(opt))

    def raw_connection(self) -> Any:
        """Refuse: a connection of the driver's own would be outside of the isolation."""
        msg = (
            "a raw connection is outside of the isolation: take that of the Session, "
            "Session.connection().connection, or run this test without isolation"
        )
        raise RuntimeError(msg)


class IsolatedConnection(Connection):
    """A Connection whose transactions are savepoints of the shared connection.

    Overridden is the layer between SQLAlchemy's transaction objects and its dialects, and what
    would end or replace the driver's connection.
    """

    opened: str
    began: _Savepoint

    def __init__(self, engine: IsolatedEngine) -> None:
        self.shared = engine.shared
        # Without events at first: "engine_connect" is for a connection fresh from the pool.
        super().__init__(
            engine, self.shared.driver_connection(), _has_events=False, _allow_revalidate=False
        )
        dispatch: Any = self.dispatch
        self.dispatch = dispatch._join(engine.dispatch)
        self.thread = threading.get_ident()
        self.undone: str | None = None  # by whom
        self._set: dict[str, _Savepoint] = {}

    def _begin_impl(self, transaction: RootTransaction) -> None:
        self._begin()
        # In SQLAlchemy's recipe for SQLite, it is a listener of this event who sends the BEGIN.
        if self.dialect.name != "sqlite":
            try:
                super()._begin_impl(transaction)
            except BaseException:
                self.shared.rollback(self)
                raise

    def _begin_twophase_impl(self, transaction: TwoPhaseTransaction) -> None:
        self.dispatch.begin_twophase(self, transaction.xid)
        self._begin()

    def _begin(self) -> None:
        self.thread = threading.get_ident()
        self.opened = application_line()
        self.undone = None
        self.began = self.shared.begin(self)

    def _commit_impl(self) -> None:
        self.dispatch.commit(self)
        self.shared.commit(self, prepared=False)

    def _rollback_impl(self) -> None:
        self.dispatch.rollback(self)
        self.shared.rollback(self)

    def _prepare_twophase_impl(self, xid: Any) -> None:
        self.dispatch.prepare_twophase(self, xid)
        self.shared.prepare(self)

    def _commit_twophase_impl(self, xid: Any, is_prepared: bool) -> None:
        self.dispatch.commit_twophase(self, xid, is_prepared)
        self.shared.commit(self, prepared=is_prepared)

    def _rollback_twophase_impl(self, xid: Any, is_prepared: bool) -> None:
        self.dispatch.rollback_twophase(self, xid, is_prepared)
        self.shared.rollback(self)

    def _savepoint_impl(self, name: str | None = None) -> str:
        self.dispatch.savepoint(self, name)
        savepoint = self.shared.set_savepoint(self)
        self._set[savepoint.name] = savepoint
        return savepoint.name

    def _rollback_to_savepoint_impl(self, name: str) -> None:
        self.dispatch.rollback_savepoint(self, name, None)
        self.shared.rollback_savepoint(self._set.pop(name))

    def _release_savepoint_impl(self, name: str) -> None:
        self.dispatch.release_savepoint(self, name, None)
        self.shared.release_savepoint(self._set.pop(name))

    def _execute_context(
        self, dialect: Any, constructor: Any, statement: Any, *arguments: Any, **options: Any
    ) -> Any:
        # No listener of "before_cursor_execute": that comes when a cursor has been made already.
        if self.get_transaction() is None and not self.shared.is_open(self):
            self.begin()
        with self.shared.working(self):
            self.shared.note(self, statement)
            return super()._execute_context(dialect, constructor, statement, *arguments, **options)

    def execution_options(self, **opt: Any) -> Connection:
        """Set options, but those of a transaction: the outer one has begun."""
        return super().execution_options(**_without_fixed(opt))

    def invalidate(self, exception: BaseException | None = None) -> None:
        """Lose the shared connection if it is broken; a rollback follows in any case."""
        # With no exception it is a caution after an interruption. A statement that really was
        # interrupted comes here by itself, with its exception.
        if exception is not None:
            self.shared.lose()
            super().invalidate(exception)

    def close(self) -> None:
        """End the transaction, and leave the driver's connection to the others."""
        try:
            transaction = self.get_transaction()
            if transaction is not None:
                transaction.close()
        finally:
            self._dbapi_connection = None


def _without_fixed(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _FIXED}
