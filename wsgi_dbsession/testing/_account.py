"""Which of the transactions that take turns on one connection has done what."""

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
        self._unsure: IsolatedTransaction | None = None  # who may have written since `_written`
        self._written: int | None = None

    def switch(self, transaction: IsolatedTransaction) -> None:
        """Switch to a transaction after others: restore its settings, count its writes."""
        if self._active is not transaction:
            self.pause()
            if not self._outer.is_aborted():
                self.settings.restore(transaction)
            self._active = transaction

    def pause(self, *, ending: IsolatedTransaction | None = None) -> None:
        """Keep the writes, settings and violations of the transaction that was active."""
        self.count()
        active, self._active = self._active, None
        if active in (None, ending) or not active.is_open:
            return
        if not self._outer.is_aborted():
            self.settings.save(active)
            if self._savepoints.wrote(active):
                others = (each.violations for each in self.open if each is not active)
                active.violations = self._deferred.find() - sum(others, Counter[Any]())

    def others(self) -> list[IsolatedTransaction]:
        """Return the open transactions of other threads."""
        me = threading.get_ident()
        return [each for each in self.open if each.thread != me]

    def expect(self, transaction: IsolatedTransaction, statement: object, text: str) -> None:
        """Expect what a statement, a string or ``Compiled``, is about to write."""
        selects = getattr(getattr(statement, "statement", None), "is_select", False)
        counted = self._outer.counts_rows and writes_only_rows(text)
        if selects or counted or looks_read_only(text):
            self.doubt(transaction)
        else:
            self.wrote(transaction)
        if not self._outer.is_aborted():
            self.settings.remember(transaction, session_settings(text))

    def wrote(self, transaction: IsolatedTransaction) -> None:
        """Write it down as the one that writes now."""
        self._savepoints.stack[-1].writers.add(transaction)
        self._unsure = self._written = None

    def doubt(self, transaction: IsolatedTransaction) -> None:
        """Find out later whether it has written: by a function, or on the driver's connection."""
        if transaction in self._savepoints.stack[-1].writers:
            self._written = None  # it may go on, which is then not counted as another one's work
        elif self._unsure is None:
            if self._written is None and not self._outer.is_aborted():
                self._written = self._outer.rows_written()
            self._unsure = transaction

    def count(self) -> None:
        """Find out now."""
        transaction, self._unsure = self._unsure, None
        if transaction is not None:
            if self._outer.is_aborted():
                self.wrote(transaction)
                return
            before, self._written = self._written, self._outer.rows_written()
            if self._written != before:
                self._savepoints.stack[-1].writers.add(transaction)

    def check_deferred(self, transaction: IsolatedTransaction) -> None:
        """Fail as COMMIT would: the release of a savepoint checks no deferred constraint.

        :raises sqlalchemy.exc.DBAPIError: one is violated.
        """
        self.count()
        if self._savepoints.wrote(transaction):
            others = [each for each in self.open if each is not transaction]
            excused = None
            if any(self._savepoints.wrote(each) for each in others):
                excused = sum((each.violations for each in others), Counter[Any]())
            self._deferred.check(excused)
