"""The connection that all Sessions share: one transaction outside, a savepoint for each of theirs.

"Joining a Session into an External Transaction" in SQLAlchemy's documentation does the same with
``join_transaction_mode="create_savepoint"``. There, transactions have to end in reverse order.
Here they end in any order: each Session gets its own Connection, on the same connection of the
driver, and what it takes for a transaction is a savepoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc
from sqlalchemy.pool import SingletonThreadPool

from wsgi_dbsession._place import application_line

from ._deferred import deferred_constraints
from ._outer import OuterTransaction
from ._savepoints import IsolatedTransaction, Savepoints
from ._settings import local_settings_of
from ._statements import ends_transaction, local_settings, looks_read_only

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sqlalchemy import Engine

    from ._savepoints import Savepoint

_OVER = "the isolation in which this transaction began is over"
_LOST = "the connection that the isolation shares was lost, and all that was done on it"
_HOW = {
    True: "the outer transaction of the isolation was committed, so the rows that were written in "
    "it remain in the database: delete them.",
    False: "the outer transaction of the isolation was rolled back. Rows that were written and "
    "committed after that remain in the database.",
    None: "the outer transaction of the isolation has ended. If it was committed, the rows that "
    "were written in it remain in the database: delete them.",
}
_INSTEAD = (
    "Look for a COMMIT or ROLLBACK in a textual statement, on a cursor or on the driver's "
    "connection, for executescript() and ON CONFLICT ROLLBACK of SQLite, and for statements of "
    "MySQL that define tables: call Session.commit() or Session.rollback() instead"
)


class _Thread(threading.local):
    """What a thread works on."""

    worker: object = None


class SharedConnection:
    """One connection of an engine, in a transaction that is never committed.

    The transactions in it are those of one thread at a time: another thread waits for its turn.
    """

    def __init__(self, engine: Engine, wait: float) -> None:
        self.loss: str | None = None
        """How the outer transaction was lost, if it was."""

        self._wait = wait
        self._turn = threading.Condition()
        self._thread = threading.get_ident()
        self._pid = os.getpid()
        self._over = False
        self._open: list[IsolatedTransaction] = []
        self._here = _Thread()
        self._late: list[Callable[[], None]] = []
        self._active: IsolatedTransaction | None = None  # whose settings are in force
        self._unsure: IsolatedTransaction | None = None  # who may have written since `_written`
        self._written: int | None = None
        self._outer = outer = OuterTransaction(engine)
        try:
            outer.begin()
            self.savepoints = Savepoints(outer.connection)
            self._deferred = deferred_constraints(outer.connection)
            self._settings = local_settings_of(outer.connection)
        except BaseException:
            outer.end()
            raise

    @contextlib.contextmanager
    def working(self, worker: object) -> Generator[None]:
        """Use the driver's connection. A rollback by the garbage collector is put off meanwhile.

        It may close a forgotten response in the middle of a statement on this same connection.
        """
        here = self._here
        if here.worker is not None:  # a listener's statement, within the one that it listens to
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

    # -- isolations -------------------------------------------------------------------------------

    def open_level(self) -> Savepoint:
        """Begin an isolation: the first one, or one in another."""
        with self._turn, self.working(self):
            self._check()
            self._pause()
            return self.savepoints.set(None)

    def close_level(self, level: Savepoint) -> None:
        """Roll back what was done since."""
        with self._turn, self.working(self):
            for transaction in self.unended(level):
                transaction.undone = _OVER
                self._leave(transaction)
            if self._outer.connection.invalidated:
                self.lose()
            if self._is_usable():
                # An error of the block comes before the report of a loss.
                with contextlib.suppress(RuntimeError), self._noticing():
                    self._pause()
                    self.savepoints.undo(level)
                    self.savepoints.end(level)

    def unended(self, level: Savepoint) -> list[IsolatedTransaction]:
        """Return the open transactions that began in this level."""
        with self._turn:
            if level not in self.savepoints.stack:
                return []
            inner = self.savepoints.stack[self.savepoints.stack.index(level) :]
            return [each for each in self._open if each.began in inner]

    def end(self) -> None:
        """Roll everything back, and give the connection back to its pool."""
        with self._turn, self.working(self):
            self._over = True
            if self.loss is None:
                self._outer.end()
            else:
                self._outer.discard()

    # -- for Connections --------------------------------------------------------------------------

    def driver_connection(self) -> Any:
        """Return the pool's connection.

        :raises RuntimeError: it cannot be used here, or not any more.
        """
        self._check()
        return self._outer.connection.connection

    def begin(self, transaction: IsolatedTransaction) -> None:
        """Begin a transaction, as soon as those of other threads have ended."""
        with self._turn, self.working(transaction):
            self._await_turn()
            self._check()
            if self._outer.is_aborted():
                # PostgreSQL accepts nothing but a rollback now, and it is sure to come.
                self._count()
                with self._noticing():
                    self.savepoints.undo(self.savepoints.stack[-1])
                self.savepoints.stack[-1].failed = True
            self._pause()
            transaction.began = self.savepoints.set(transaction)
            transaction.is_open = True
            self._open.append(transaction)
            try:
                self._switch(transaction)
            except BaseException:
                self._roll_back(transaction)
                raise

    def prepare(self, transaction: IsolatedTransaction) -> None:
        """Fail now if a commit would fail."""
        with self._turn, self.working(transaction):
            self.check(transaction)
            self._switch(transaction)
            self._check_deferred(transaction)

    def commit(self, transaction: IsolatedTransaction, *, prepared: bool) -> None:
        """Commit, or roll back and raise."""
        with self._turn, self.working(transaction):
            try:
                self.check(transaction)
                self._switch(transaction)
                if not prepared:
                    self._check_deferred(transaction)
                self._pause(ending=transaction)
                self.savepoints.commit(transaction)
            except BaseException:
                self._roll_back(transaction)
                raise
            self._leave(transaction)

    def rollback(self, transaction: IsolatedTransaction) -> None:
        """Roll back, now or after the statement that this thread executes."""
        if self._here.worker not in (None, transaction):
            self._late.append(functools.partial(self._roll_back, transaction))
            return
        with self._turn, self.working(transaction):
            self._roll_back(transaction)

    def set_savepoint(self, transaction: IsolatedTransaction) -> Savepoint:
        """Set a savepoint of the application's own."""
        with self._turn, self.working(transaction):
            self.check(transaction)
            self._switch(transaction)
            self._count()
            savepoint = self.savepoints.set(transaction)
            self._settings.save(transaction)
            savepoint.settings = transaction.settings
            return savepoint

    def release_savepoint(self, savepoint: Savepoint) -> None:
        """Release a savepoint of the application's own."""
        transaction = savepoint.owner
        assert transaction is not None
        with self._turn, self.working(transaction):
            self.check(transaction)
            self._switch(transaction)
            self._count()
            self.savepoints.end(savepoint)

    def rollback_savepoint(self, savepoint: Savepoint) -> None:
        """Undo what its owner did since; see :meth:`rollback`."""
        if self._here.worker not in (None, savepoint.owner):
            self._late.append(functools.partial(self._roll_back_to, savepoint))
            return
        with self._turn, self.working(savepoint.owner):
            self._roll_back_to(savepoint)

    def check(self, transaction: IsolatedTransaction) -> None:
        """Raise if this transaction cannot go on."""
        self._check()
        if transaction.undone is not None:
            raise RuntimeError(transaction.undone)
        if self.savepoints.has_failed(transaction):
            msg = "a statement failed in this transaction: call Session.rollback() to go on"
            raise exc.PendingRollbackError(msg)

    def before_statement(self, transaction: IsolatedTransaction, statement: Any) -> None:
        """Prepare for a statement, a string or ``Compiled``.

        :raises RuntimeError: it must not run.
        """
        text = str(statement)
        with self._turn:
            transaction.thread = threading.get_ident()
            self.check(transaction)
            if ends_transaction(text):
                msg = (
                    "a statement must not end the outer transaction of the isolation, got "
                    f"{text.strip()!r}: call Session.commit() or Session.rollback() instead"
                )
                raise RuntimeError(msg)
            self._switch(transaction)
            selects = getattr(getattr(statement, "statement", None), "is_select", False)
            if selects or looks_read_only(text):
                self._doubt(transaction)
            else:
                self._wrote(transaction)

    def before_cursor(self, text: str, parameters: Any) -> None:
        """Look after the settings that a statement is about to make."""
        with self._turn:
            self._settings.learn(local_settings(text, parameters))

    def after_statement(self) -> None:
        """Raise if the statement has ended the outer transaction."""
        with self._turn:
            self._check_outer()

    def before_driver(self, transaction: IsolatedTransaction) -> None:
        """Expect writes of the application on the driver's connection."""
        with self._turn, self.working(transaction):
            if transaction.is_open and self._is_usable():
                self._switch(transaction)
                self._doubt(transaction)

    def has_written(self, transaction: IsolatedTransaction) -> bool:
        """Return whether it has written something that was not rolled back."""
        with self._turn, self.working(transaction):
            if self._is_usable():
                self._count()
            return transaction.is_open and self.savepoints.wrote(transaction)

    def lose(self) -> None:
        """Remember that the connection is broken."""
        self.loss = self.loss or _LOST

    # -- transactions; call these with the lock held ----------------------------------------------

    def _check_deferred(self, transaction: IsolatedTransaction) -> None:
        """Fail as COMMIT would: the release of a savepoint checks no deferred constraint.

        :raises sqlalchemy.exc.DBAPIError: one is violated.
        """
        self._count()
        if self.savepoints.wrote(transaction):
            others = [each for each in self._open if each is not transaction]
            excused = None
            if any(self.savepoints.wrote(each) for each in others):
                excused = sum((each.violations for each in others), Counter[Any]())
            self._deferred.check(excused)

    def _roll_back(self, transaction: IsolatedTransaction) -> None:
        try:
            if self._is_usable():
                self._pause(ending=transaction)
                self._undo(transaction.began)
        finally:
            self._leave(transaction)

    def _roll_back_to(self, savepoint: Savepoint) -> None:
        owner = savepoint.owner
        assert owner is not None
        if self._is_usable():
            self._pause(ending=owner)
            self._undo(savepoint)
            owner.settings = savepoint.settings
            self._switch(owner)

    def _undo(self, savepoint: Savepoint) -> None:
        with self._noticing():
            self.savepoints.roll_back(savepoint, aborted=self._outer.is_aborted())

    # -- who does what; call these with the lock held ---------------------------------------------

    def _switch(self, transaction: IsolatedTransaction) -> None:
        """Switch to a transaction after others: restore its settings, count its writes."""
        if self._active is not transaction:
            self._pause()
            if not self._outer.is_aborted():
                self._settings.restore(transaction)
            self._active = transaction

    def _pause(self, *, ending: IsolatedTransaction | None = None) -> None:
        """Keep the writes, settings and violations of the transaction that was active."""
        self._count()
        active, self._active = self._active, None
        if active in (None, ending) or not active.is_open:
            return
        if not self._outer.is_aborted():
            self._settings.save(active)
            if self.savepoints.wrote(active):
                others = (each.violations for each in self._open if each is not active)
                active.violations = self._deferred.find() - sum(others, Counter[Any]())

    def _wrote(self, transaction: IsolatedTransaction) -> None:
        self.savepoints.stack[-1].writers.add(transaction)
        self._unsure = self._written = None

    def _doubt(self, transaction: IsolatedTransaction) -> None:
        """Find out later whether it has written: by a function, or on the driver's connection."""
        if transaction not in self.savepoints.stack[-1].writers and self._unsure is None:
            if self._written is None and not self._outer.is_aborted():
                self._written = self._outer.rows_written()
            self._unsure = transaction

    def _count(self) -> None:
        transaction, self._unsure = self._unsure, None
        if transaction is not None:
            if self._outer.is_aborted():
                self._wrote(transaction)
                return
            before, self._written = self._written, self._outer.rows_written()
            if self._written != before:
                self.savepoints.stack[-1].writers.add(transaction)

    # -- state; call these with the lock held -----------------------------------------------------

    def _leave(self, transaction: IsolatedTransaction) -> None:
        if transaction.is_open:
            transaction.is_open = False
            self._open.remove(transaction)
            self._turn.notify_all()

    def _others(self) -> list[IsolatedTransaction]:
        me = threading.get_ident()
        return [each for each in self._open if each.thread != me]

    def _await_turn(self) -> None:
        if not self._turn.wait_for(lambda: not self._others(), self._wait):
            other = self._others()[0]
            msg = (
                f"timed out after {self._wait:g} s, waiting for the end of another thread's "
                f"transaction, which was begun at {other.opened}. In the isolation all threads "
                "share one connection, so their transactions take turns. If the test itself holds "
                "it open while it waits for a request in another thread: commit it before, by "
                "Session.commit() or in a `with session_scope(Session):` block of its own"
            )
            raise RuntimeError(msg)

    def _check(self) -> None:
        if self._over:
            raise RuntimeError(_OVER)
        if os.getpid() != self._pid:
            msg = (
                "a forked process must not use the connection of its parent's isolation: begin an "
                "isolation in the child"
            )
            raise RuntimeError(msg)
        if threading.get_ident() != self._thread and isinstance(
            self._outer.connection.engine.pool, SingletonThreadPool
        ):
            msg = (
                "each thread has its own in-memory SQLite database: share one by "
                'create_engine("sqlite://", poolclass=StaticPool, '
                'connect_args={"check_same_thread": False})'
            )
            raise RuntimeError(msg)
        self._check_outer()

    def _check_outer(self) -> None:
        if self._outer.connection.invalidated:
            self.lose()
        elif self.loss is None and self._outer.has_ended():
            self._find_loss()
        if self.loss is not None:
            raise RuntimeError(self.loss)

    def _is_usable(self) -> bool:
        return self.loss is None and not self._over and os.getpid() == self._pid

    @contextlib.contextmanager
    def _noticing(self) -> Generator[None]:
        """Notice that a savepoint is gone, and the outer transaction with it."""
        try:
            yield
        except exc.DBAPIError as error:
            if self._outer.connection.invalidated:
                self.lose()
            else:
                try:
                    self.savepoints.undo(self.savepoints.stack[0])
                except exc.DBAPIError:
                    self._find_loss()
                else:
                    self.loss = (
                        "a savepoint of the isolation is gone. "
                        f"This was noticed at {application_line()}. "
                        "A textual ROLLBACK TO SAVEPOINT or RELEASE SAVEPOINT removes those that "
                        "were set later: call Session.begin_nested() instead"
                    )
            raise RuntimeError(self.loss) from error

    def _find_loss(self) -> None:
        how = _HOW[self._outer.was_committed()]
        self.loss = f"{how} This was noticed at {application_line()}. {_INSTEAD}"
