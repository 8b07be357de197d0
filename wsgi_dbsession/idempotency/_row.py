"""Keep a request's row in the transaction that is committed, whatever is rolled back before."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from wsgi_dbsession._scope import current_scope

if TYPE_CHECKING:
    from ._rows import Claim, Rows, Stored

# Key in Scope.info: the rows of the request.
_KEY = "wsgi_dbsession.idempotency_rows"


class Taken(Exception):  # noqa: N818 - it never leaves this package
    """Another request has taken the key after the application rolled back this one's row."""


class Row:
    """The row of a claim that has succeeded.

    The application may roll back the transaction or the savepoint in which the row was last
    written. Then the row is written again before the application's next commit.

    :param rows: reads and writes the table.
    :param claim: the request's claim to its key.
    """

    __slots__ = ("_claim", "_is_committed", "_is_taken", "_rows", "_stored", "_transactions")

    def __init__(self, rows: Rows, claim: Claim) -> None:
        self._rows = rows
        self._claim = claim
        self._stored: Stored | None = None
        self._is_committed = False  # in the version that was last written
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

        :param session: a Session of the registry, by default the current one.
        :raises Taken: if the key does not belong to this request any more.
        """
        self.check()
        if session is None:
            session = self._rows.session()
        if session.in_transaction() and not self._is_committed:
            # A savepoint that has ended may have been rolled back, or an outer one may be later.
            if (saved := self._transactions) is not None:
                root, savepoint = _current(session)
                if saved[0]() is root() and (saved[1] is None or saved[1] == savepoint):
                    return
            self._write(session)

    def check(self) -> None:
        """Raise :class:`Taken` if the key does not belong to this request any more."""
        if self._is_taken:
            msg = "another request took the Idempotency-Key after a rollback by the application"
            raise Taken(msg)

    def before_commit(self, session: Any) -> None:
        """Write the row again if it would be missing after this commit."""
        if self._rows.owns(session):
            self.renew(session)

    def after_commit(self, session: Session) -> None:
        """Record that the transaction in which the row was last written is committed."""
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
    """Return weak references to the Session's transaction and to its savepoint, if it has one."""
    savepoint = session.get_nested_transaction()
    transaction: Any = session.get_transaction()
    # Strong ones would make the Session part of a cycle.
    return weakref.ref(transaction), None if savepoint is None else weakref.ref(savepoint)


def listen() -> None:
    """Listen to the commits of all Sessions, because the scope may get another Session later."""
    if not event.contains(Session, "before_commit", _before_commit):
        event.listen(Session, "before_commit", _before_commit)
        event.listen(Session, "after_commit", _after_commit)


def _rows_of(session: Any) -> list[Row]:
    scope = getattr(session, "dbsession_scope", None)
    # After the outcome, a hook may commit, which does not concern the key.
    if scope is None or scope.outcome is not None:
        return []
    found: list[Row] = scope.info.get(_KEY, [])
    return found


def _before_commit(session: Session) -> None:
    for row in _rows_of(session):
        row.before_commit(session)


def _after_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        for row in _rows_of(session):
            row.after_commit(session)
