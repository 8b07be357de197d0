"""The row of one request, which stays in the transaction that is committed."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from wsgi_dbsession._scope import current_scope

if TYPE_CHECKING:
    from ._rows import Claim, Rows, Stored

# In Scope.info: the rows of the request.
_KEY = "wsgi_dbsession.idempotency_rows"


class Taken(Exception):  # noqa: N818 - it never leaves this package
    """The key belongs to another request, because the application rolled back this one's row."""


class Row:
    """The row of a claim that has succeeded.

    The application may roll back the transaction, or the savepoint, in which the row was last
    written. Then it is written again, before another transaction commits.

    :param rows: the table.
    :param claim: the request's claim to its key.
    """

    __slots__ = ("_claim", "_is_committed", "_is_taken", "_rows", "_stored", "_transactions")

    def __init__(self, rows: Rows, claim: Claim) -> None:
        self._rows = rows
        self._claim = claim
        self._stored: Stored | None = None
        self._is_committed = False  # as it was last written
        self._transactions: tuple[Any, Any] | None = _current(rows.session())
        self._is_taken = False
        listen()
        current_scope().info.setdefault(_KEY, []).append(self)

    def store(self, stored: Stored) -> None:
        """Store the response.

        :raises Taken: if the key does not belong to this request any more.
        """
        self.check()
        self._stored = stored
        self._write(self._rows.session())

    def renew(self, session: Any = None) -> None:
        """Write the row again if the application has rolled back what was last written.

        :param session: the registry's Session, by default that of the scope.
        :raises Taken: if the key does not belong to this request any more.
        """
        self.check()
        if session is None:
            session = self._rows.session()
        if session.in_transaction() and not self._is_committed:
            # A savepoint that is over may have been rolled back, or is part of one that will be.
            if (saved := self._transactions) is not None:
                root, savepoint = _current(session)
                if saved[0]() is root() and (saved[1] is None or saved[1] == savepoint):
                    return
            self._write(session)

    def check(self) -> None:
        """Raise if the key does not belong to this request any more.

        :raises Taken: it was given to another one.
        """
        if self._is_taken:
            msg = "another request took the Idempotency-Key after a rollback by the application"
            raise Taken(msg)

    def before_commit(self, session: Any) -> None:
        """Write the row again if it would be missing after this commit of the application."""
        if self._rows.owns(session):
            self.renew(session)

    def after_commit(self, session: Session) -> None:
        """Note that the transaction in which the row was last written is committed."""
        if (saved := self._transactions) is not None and saved[0]() is session.get_transaction():
            self._is_committed = True

    def _write(self, session: Any) -> None:
        self._transactions, self._is_committed = None, False
        if not self._rows.store(session, self._claim, self._stored):
            self._is_taken = True
            # Nothing of this request may be committed, whatever the application catches.
            session.dbsession_scope.doom()
            self.check()
        self._transactions = _current(session)


def _current(session: Session) -> tuple[Any, Any]:
    """Return references to the Session's transaction and savepoint, None without a savepoint."""
    savepoint = session.get_nested_transaction()
    transaction: Any = session.get_transaction()
    # Weak ones, or the Session would be part of a cycle.
    return weakref.ref(transaction), None if savepoint is None else weakref.ref(savepoint)


def listen() -> None:
    """Listen to the commits of all Sessions: the scope's may be another one later."""
    if not event.contains(Session, "before_commit", _before_commit):
        event.listen(Session, "before_commit", _before_commit)
        event.listen(Session, "after_commit", _after_commit)


def _found(session: Any) -> list[Row]:
    scope = getattr(session, "dbsession_scope", None)
    # What a hook commits comes after the outcome: it has nothing to do with the key.
    if scope is None or scope.outcome is not None:
        return []
    found: list[Row] = scope.info.get(_KEY, [])
    return found


def _before_commit(session: Session) -> None:
    for row in _found(session):
        row.before_commit(session)


def _after_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        for row in _found(session):
            row.after_commit(session)
