"""The connection that all Sessions share: one transaction outside, a savepoint for each of theirs.

"Joining a Session into an External Transaction" in SQLAlchemy's documentation does the same with
``join_transaction_mode="create_savepoint"``. There, transactions have to end in reverse order.
Here they end in any order: each Session gets its own Connection, on the same connection of the
driver, and what it takes for a transaction is a savepoint.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc

from ._account import Account
from ._loss import Loss
from ._outer import OuterTransaction
from ._savepoints import IsolatedTransaction, Savepoints
from ._statements import changes_rows, ends_transaction, local_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sqlalchemy import Engine

    from ._savepoints import Savepoint

_OVER = "the isolation in which this transaction began is over"


class _Thread(threading.local):
    """What a thread works on."""

    worker: object = None


class SharedConnection:
    """One connection of an engine, in a transaction that is never committed.

    The transactions in it are those of one thread at a time: another thread waits for its turn.
    """

    def __init__(self, engine: Engine, wait: float) -> None:
        self._wait = wait
        self._turn = threading.Condition()
        self._over = False
        self._here = _Thread()
        self._late: list[Callable[[], None]] = []
        self._outer = outer = OuterTransaction(engine)
        self.savepoints = Savepoints(outer.connection)
        self.loss = Loss(outer, self.savepoints)
        try:
            outer.begin()
            self._account = Account(outer, self.savepoints)
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
            self._account.pause()
            return self.savepoints.set(None)

    def close_level(self, level: Savepoint) -> None:
        """Roll back what was done since."""
        with self._turn, self.working(self):
            for transaction in self.unended(level):
                transaction.undone = _OVER
                self._leave(transaction)
            self.loss.look()
            if self._is_usable():
                # An error of the block comes before the report of a loss.
                with contextlib.suppress(RuntimeError), self.loss.noticing():
                    self._account.pause()
                    self.savepoints.undo(level)
                    self.savepoints.end(level)

    def unended(self, level: Savepoint) -> list[IsolatedTransaction]:
        """Return the open transactions that began in this level."""
        with self._turn:
            if level not in self.savepoints.stack:
                return []
            inner = self.savepoints.stack[self.savepoints.stack.index(level) :]
            return [each for each in self._account.open if each.began in inner]

    def end(self) -> None:
        """Roll everything back, and give the connection back to its pool."""
        with self._turn, self.working(self):
            self._over = True
            if self.loss.message is None:
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
                self._account.count()
                with self.loss.noticing():
                    self.savepoints.undo(self.savepoints.stack[-1])
                self.savepoints.stack[-1].failed = True
            self._account.pause()
            transaction.began = self.savepoints.set(transaction)
            transaction.is_open = True
            self._account.open.append(transaction)
            try:
                self._account.switch(transaction)
            except BaseException:
                self._roll_back(transaction)
                raise

    def prepare(self, transaction: IsolatedTransaction) -> None:
        """Fail now if a commit would fail."""
        with self._turn, self.working(transaction):
            self.check(transaction)
            self._account.switch(transaction)
            self._account.check_deferred(transaction)

    def commit(self, transaction: IsolatedTransaction, *, prepared: bool) -> None:
        """Commit, or roll back and raise."""
        with self._turn, self.working(transaction):
            try:
                self.check(transaction)
                self._account.switch(transaction)
                if not prepared:
                    self._account.check_deferred(transaction)
                self._account.pause(ending=transaction)
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
            self._account.switch(transaction)
            self._account.count()
            savepoint = self.savepoints.set(transaction)
            self._account.settings.save(transaction)
            savepoint.settings = transaction.settings
            return savepoint

    def release_savepoint(self, savepoint: Savepoint) -> None:
        """Release a savepoint of the application's own."""
        transaction = savepoint.owner
        assert transaction is not None
        with self._turn, self.working(transaction):
            self.check(transaction)
            self._account.switch(transaction)
            self._account.count()
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
            self._account.switch(transaction)
            self._account.expect(transaction, statement, text)

    def before_cursor(self, text: str, parameters: Any) -> None:
        """Look after the settings that a statement is about to make."""
        with self._turn:
            self._account.settings.learn(local_settings(text, parameters))

    def after_cursor(self, transaction: IsolatedTransaction, text: str, rowcount: int) -> None:
        """Count a statement that has changed rows as a write."""
        if rowcount > 0 and changes_rows(text):
            with self._turn:
                self._account.wrote(transaction)

    def after_statement(self) -> None:
        """Raise if the statement has ended the outer transaction."""
        with self._turn:
            self.loss.check()

    def before_driver(self, transaction: IsolatedTransaction) -> None:
        """Expect writes of the application on the driver's connection."""
        with self._turn, self.working(transaction):
            if transaction.is_open and self._is_usable():
                self._account.switch(transaction)
                self._account.doubt(transaction)

    def has_written(self, transaction: IsolatedTransaction) -> bool:
        """Return whether it has written something that was not rolled back."""
        with self._turn, self.working(transaction):
            if self._is_usable():
                self._account.count()
            return transaction.is_open and self.savepoints.wrote(transaction)

    # -- call these with the lock held ------------------------------------------------------------

    def _roll_back(self, transaction: IsolatedTransaction) -> None:
        try:
            if self._is_usable():
                self._account.pause(ending=transaction)
                self._undo(transaction.began)
        finally:
            self._leave(transaction)

    def _roll_back_to(self, savepoint: Savepoint) -> None:
        owner = savepoint.owner
        assert owner is not None
        if self._is_usable():
            self._account.pause(ending=owner)
            self._undo(savepoint)
            owner.settings = savepoint.settings
            self._account.switch(owner)

    def _undo(self, savepoint: Savepoint) -> None:
        with self.loss.noticing():
            self.savepoints.roll_back(savepoint, aborted=self._outer.is_aborted())
            self._account.settings.revert(savepoint)

    def _leave(self, transaction: IsolatedTransaction) -> None:
        if transaction.is_open:
            transaction.is_open = False
            self._account.open.remove(transaction)
            self._turn.notify_all()

    def _await_turn(self) -> None:
        if not self._turn.wait_for(lambda: not self._account.others(), self._wait):
            other = self._account.others()[0]
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
        self._outer.check_place()
        self.loss.check()

    def _is_usable(self) -> bool:
        return self.loss.message is None and not self._over and not self._outer.is_inherited()
