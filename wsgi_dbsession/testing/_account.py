"""Record what each transaction on the shared connection has done."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from ._deferred import deferred_constraints
from ._settings import local_settings_of
from ._statements import looks_read_only, session_settings, writes_only_rows

if TYPE_CHECKING:
    from ._outer import OuterTransaction
    from ._savepoints import IsolatedTransaction, Savepoints


class Account:
    """The writes, settings and violations of each open transaction. The caller holds the lock."""

    def __init__(self, outer: OuterTransaction, savepoints: Savepoints) -> None:
        self.open: list[IsolatedTransaction] = []
        self.settings = local_settings_of(outer.connection)
        self._outer = outer
        self._savepoints = savepoints
        self._deferred = deferred_constraints(outer.connection)
        self._active: IsolatedTransaction | None = None  # whose settings are in force
        # The transaction that may have written since `_rows_written` was read.
        self._possible_writer: IsolatedTransaction | None = None
        self._rows_written: int | None = None

    def switch(self, transaction: IsolatedTransaction) -> None:
        """Pause the active transaction, and resume this one with its settings."""
        if self._active is not transaction:
            self.pause()
            if not self._outer.is_aborted():
                self.settings.restore(transaction)
            self._active = transaction

    def pause(self, *, ending: IsolatedTransaction | None = None) -> None:
        """Save the writes, settings and violations of the active transaction."""
        self.count_rows()
        active, self._active = self._active, None
        if active in (None, ending) or not active.is_open:
            return
        if not self._outer.is_aborted():
            self.settings.save(active)
            if self._savepoints.has_written(active):
                others = (each.violations for each in self.open if each is not active)
                active.violations = self._deferred.find() - sum(others, Counter[Any]())

    def others(self) -> list[IsolatedTransaction]:
        """Return the open transactions of other threads."""
        me = threading.get_ident()
        return [each for each in self.open if each.thread != me]

    def record_statement(
        self, transaction: IsolatedTransaction, statement: object, text: str
    ) -> None:
        """Record what a statement is going to write.

        :param statement: a string or ``Compiled``.
        """
        selects = getattr(getattr(statement, "statement", None), "is_select", False)
        counted = self._outer.counts_rows and writes_only_rows(text)
        if selects or counted or looks_read_only(text):
            self.record_possible_write(transaction)
        else:
            self.record_write(transaction)
        if not self._outer.is_aborted():
            self.settings.record(transaction, session_settings(text))

    def record_write(self, transaction: IsolatedTransaction) -> None:
        """Record that a transaction writes."""
        self._savepoints.stack[-1].writers.add(transaction)
        self._possible_writer = self._rows_written = None

    def record_possible_write(self, transaction: IsolatedTransaction) -> None:
        """Record that a transaction may write, in a function or on the driver's connection.

        The next call of :meth:`count_rows` decides.
        """
        if transaction in self._savepoints.stack[-1].writers:
            self._rows_written = None  # the next one must not be charged with what this one writes
        elif self._possible_writer is None:
            if self._rows_written is None and not self._outer.is_aborted():
                self._rows_written = self._outer.rows_written()
            self._possible_writer = transaction

    def count_rows(self) -> None:
        """Record the possible writer as a writer, if rows have been written since."""
        transaction, self._possible_writer = self._possible_writer, None
        if transaction is not None:
            if self._outer.is_aborted():
                self.record_write(transaction)
                return
            before, self._rows_written = self._rows_written, self._outer.rows_written()
            if self._rows_written != before:
                self._savepoints.stack[-1].writers.add(transaction)

    def check_deferred(self, transaction: IsolatedTransaction) -> None:
        """Fail as COMMIT would: releasing a savepoint does not check deferred constraints.

        :raises sqlalchemy.exc.DBAPIError: a constraint is violated.
        """
        self.count_rows()
        if self._savepoints.has_written(transaction):
            others = [each for each in self.open if each is not transaction]
            excused = None
            if any(self._savepoints.has_written(each) for each in others):
                excused = sum((each.violations for each in others), Counter[Any]())
            self._deferred.check(excused)
