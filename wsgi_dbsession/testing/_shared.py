"""The connection that all Sessions share: their transactions are savepoints of an outer one.

"Joining a Session into an External Transaction" in SQLAlchemy's documentation does the same with
``join_transaction_mode="create_savepoint"``. There, transactions must end in reverse order. Here
they end in any order, because each Session has its own Connection on the same driver connection.
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
    """For which object this thread uses the connection."""

    user: object = None


class SharedConnection:
    """One connection of an engine, in a transaction that is never committed.

    Its open transactions belong to one thread at a time: other threads wait for their turn.
    """

    def __init__(self, engine: Engine, wait: float) -> None:
        self._wait = wait
        self._turn = threading.Condition()
        self._over = False
        self._here = _Thread()
        self._postponed: list[Callable[[], None]] = []
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
    def in_use_by(self, user: object) -> Generator[None]:
        """Postpone rollbacks by the garbage collector while this thread uses the connection.

        It may close a forgotten response in the middle of a statement on the same connection.
        """
        here = self._here
        if here.user is not None:  # a listener runs a statement inside of another one
            yield
            return
        here.user = user
        try:
            yield
        finally:
            try:
                with self._turn:
                    while self._postponed:
                        self._postponed.pop(0)()
            finally:
                here.user = None

    # -- isolations -------------------------------------------------------------------------------

    def open_level(self) -> Savepoint:
        """Begin an isolation, perhaps inside of another one."""
        with self._turn, self.in_use_by(self):
            self._check()
            self._account.pause()
            return self.savepoints.set(None)

    def close_level(self, level: Savepoint) -> None:
        """Roll back everything since a level was opened."""
        with self._turn, self.in_use_by(self):
            for transaction in self.open_transactions(level):
                transaction.undone = _OVER
                self._leave(transaction)
            self.loss.check_connection()
            if self._is_usable():
                # An error in the block takes precedence. find_faults() reports the loss.
                with contextlib.suppress(RuntimeError), self.loss.detecting():
                    self._account.pause()
                    self.savepoints.undo(level)
                    self.savepoints.end(level)

    def open_transactions(self, level: Savepoint) -> list[IsolatedTransaction]:
        """Return the open transactions that began in a level."""
        with self._turn:
            if level not in self.savepoints.stack:
                return []
            inner = self.savepoints.stack[self.savepoints.stack.index(level) :]
            return [each for each in self._account.open if each.began in inner]

    def end(self) -> None:
        """Roll everything back, and return the connection to its pool, or discard it if lost."""
        with self._turn, self.in_use_by(self):
            self._over = True
            if self.loss.message is None:
                self._outer.end()
            else:
                self._outer.discard()

    # -- for Connections --------------------------------------------------------------------------

    def driver_connection(self) -> Any:
        """Return the pool's connection.

        :raises RuntimeError: this process or thread cannot use it, or it is lost.
        """
        self._check()
        return self._outer.connection.connection

    def begin(self, transaction: IsolatedTransaction) -> None:
        """Begin a transaction when those of other threads have ended."""
        with self._turn, self.in_use_by(transaction):
            self._await_turn()
            self._check()
            if self._outer.is_aborted():
                # PostgreSQL accepts only a rollback, and the failed transaction needs one anyway.
                self._account.count_rows()
                with self.loss.detecting():
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
        """Raise if a commit would fail."""
        with self._turn, self.in_use_by(transaction):
            self.check(transaction)
            self._account.switch(transaction)
            self._account.check_deferred(transaction)

    def commit(self, transaction: IsolatedTransaction, *, prepared: bool) -> None:
        """Commit, or roll back and raise."""
        with self._turn, self.in_use_by(transaction):
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
        """Roll back now, or after the statement that this thread is executing."""
        if self._here.user not in (None, transaction):
            self._postponed.append(functools.partial(self._roll_back, transaction))
            return
        with self._turn, self.in_use_by(transaction):
            self._roll_back(transaction)

    def set_savepoint(self, transaction: IsolatedTransaction) -> Savepoint:
        """Set a savepoint for the application."""
        with self._turn, self.in_use_by(transaction):
            self.check(transaction)
            self._account.switch(transaction)
            self._account.count_rows()
            savepoint = self.savepoints.set(transaction)
            self._account.settings.save(transaction)
            savepoint.settings = transaction.settings
            return savepoint

    def release_savepoint(self, savepoint: Savepoint) -> None:
        """Release a savepoint of the application."""
        transaction = savepoint.owner
        assert transaction is not None
        with self._turn, self.in_use_by(transaction):
            self.check(transaction)
            self._account.switch(transaction)
            self._account.count_rows()
            self.savepoints.end(savepoint)

    def rollback_savepoint(self, savepoint: Savepoint) -> None:
        """Roll back to a savepoint of the application; see :meth:`rollback`."""
        if self._here.user not in (None, savepoint.owner):
            self._postponed.append(functools.partial(self._roll_back_to, savepoint))
            return
        with self._turn, self.in_use_by(savepoint.owner):
            self._roll_back_to(savepoint)

    def check(self, transaction: IsolatedTransaction) -> None:
        """Raise if a transaction cannot continue."""
        self._check()
        if transaction.undone is not None:
            raise RuntimeError(transaction.undone)
        if self.savepoints.has_failed(transaction):
            msg = "a statement failed in this transaction: call Session.rollback() to go on"
            raise exc.PendingRollbackError(msg)

    def before_statement(self, transaction: IsolatedTransaction, statement: Any) -> None:
        """Prepare for a statement.

        :param statement: a string or ``Compiled``.
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
            self._account.record_statement(transaction, statement, text)

    def before_cursor(self, text: str, parameters: Any) -> None:
        """Track the settings that a statement is going to change."""
        with self._turn:
            self._account.settings.track(local_settings(text, parameters))

    def after_cursor(self, transaction: IsolatedTransaction, text: str, rowcount: int) -> None:
        """Record a write if the statement has changed rows."""
        if rowcount > 0 and changes_rows(text):
            with self._turn:
                self._account.record_write(transaction)

    def after_statement(self) -> None:
        """Raise if the statement has ended the outer transaction."""
        with self._turn:
            self.loss.check()

    def before_driver(self, transaction: IsolatedTransaction) -> None:
        """Record that the application may write on the driver's connection."""
        with self._turn, self.in_use_by(transaction):
            if transaction.is_open and self._is_usable():
                self._account.switch(transaction)
                self._account.record_possible_write(transaction)

    def has_written(self, transaction: IsolatedTransaction) -> bool:
        """Return whether a transaction has written something that was not rolled back."""
        with self._turn, self.in_use_by(transaction):
            if self._is_usable():
                self._account.count_rows()
            return transaction.is_open and self.savepoints.has_written(transaction)

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
        with self.loss.detecting():
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
                "share one connection, so their transactions take turns. If the test holds it "
                "open while a request runs in another thread, commit it first: call "
                "Session.commit(), or use a separate `with session_scope(Session):` block"
            )
            raise RuntimeError(msg)

    def _check(self) -> None:
        if self._over:
            raise RuntimeError(_OVER)
        self._outer.check_place()
        self.loss.check()

    def _is_usable(self) -> bool:
        return self.loss.message is None and not self._over and not self._outer.is_inherited()
