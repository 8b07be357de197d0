"""Flush, prepare, commit, roll back and close some Sessions, and the truth about a failure.

This floor knows SQLAlchemy only.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sqlalchemy import exc
from sqlalchemy.orm import Session

from . import _driver, _spoiled
from ._report import log

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import TypeAlias

    from sqlalchemy import Connection
    from sqlalchemy.engine import Transaction
    from sqlalchemy.orm import SessionTransaction

Transactions: TypeAlias = "Sequence[tuple[Connection, Transaction]]"
Truth: TypeAlias = Literal["rolled back", "unknown", "committed", "partly committed"]


_ENDED = (
    "cannot commit: the application has closed, committed or rolled back Session.connection(). "
    "Call Session.commit() or Session.rollback() instead"
)


class AdoptedSession(Session):
    """A Session that reports what a ``close()`` discards; mixed into the application's class."""

    dbsession_lines: ClassVar[set[str]]  # which a warning has named
    dbsession_scope: Any = None  # that keeps it
    dbsession_pid: int  # of the process that made it
    dbsession_has_written: Any = None  # a function instead of has_written(), for discards
    # Of the current transaction: the savepoints that were open at the first flush, None before it,
    # and whether a savepoint was rolled back.
    dbsession_flushed: list[SessionTransaction] | None = None
    dbsession_undone = False
    dbsession_committed = False  # by the current call of commit()

    # The application's class may take arguments.
    def close(self, *args: Any, **kwargs: Any) -> None:
        """Close the Session; a scope that has it refuses to commit if it had written."""
        self._report_discard()
        super().close(*args, **kwargs)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Close the Session, see :meth:`close`."""
        self._report_discard()
        super().reset(*args, **kwargs)

    def invalidate(self, *args: Any, **kwargs: Any) -> None:
        """Close the Session and its connections, see :meth:`close`."""
        self._report_discard()
        super().invalidate(*args, **kwargs)

    def _report_discard(self) -> None:
        scope = self.dbsession_scope
        if scope is not None and self in scope.sessions.values() and is_begun(self):
            scope.discarded(self)


def is_begun(session: Session) -> bool:
    """Return whether a Session has something to commit or to lose."""
    # A listener of a commit may have added an object to a transaction that is over.
    return session.in_transaction() or has_changes(session)


def connections(session: Session) -> Transactions:
    """Return the connections of a Session's transaction, and their transactions."""
    transaction: Any = session.get_transaction()
    if transaction is None:
        return []
    # The public ways: a listener of after_begin would slow down each transaction, and
    # SessionTransaction.connections, new in 2.1.7, does not have the transactions.
    entries: dict[Any, tuple[Any, ...]] = transaction._connections
    # Each entry has two keys, its connection and its engine.
    return [entry[:2] for key, entry in entries.items() if key is entry[0]]


def has_changes(session: Any) -> bool:
    """Return whether a flush has something to write; in ``after_flush``, whether it had."""
    # The public Session.new, Session.deleted and Session.dirty build sets each time.
    return bool(
        session._new
        or session._deleted
        or (session.identity_map._modified and any(map(session.is_modified, session.dirty)))
    )


def has_written(session: Session) -> bool | None:
    """Return whether the transaction of this Session has something to lose, None if unknown."""
    if has_changes(session):
        return True
    found: set[bool | None] = {None}
    if session.is_active:  # otherwise a flush has failed, and SQLAlchemy has rolled back
        undone = getattr(session, "dbsession_undone", False)
        found = {_driver.has_written(each, undone=undone) for each, _ in connections(session)}
    if found <= {False}:
        return False  # for example at AUTOCOMMIT, even after a flush
    flushed = getattr(session, "dbsession_flushed", None) is not None
    return True if flushed or True in found else None


def is_autocommit(session: Session) -> bool:
    """Return whether what a Session wrote stays, whatever the outcome is."""
    return any(
        _driver.is_autocommit(connection) and not _driver.is_read_only(connection)
        for connection, _ in connections(session)
    )


def is_inherited(session: Any) -> bool:
    """Return whether this Session was made by the parent process, see ``_fork``."""
    return bool(session.dbsession_pid != os.getpid())


class Commit:
    """One commit of some Sessions: all or none, as far as it goes.

    All are flushed before the first is committed. Two-phase ones are prepared, then one-phase
    ones are committed, then the prepared ones. A transaction that was begun is committed, though
    nothing seems to have changed: textual SQL leaves no trace.

    :param sessions: the Sessions by registry, whose ``number`` gives their order.
    :param final: whether the scope ends with it, so that objects are not expired: reading an
        attribute afterwards begins no transaction.
    """

    # Defaults in the class: to set them in each instance would slow down each commit.
    _committed = 0
    _late: BaseException | None = None  # out of an after_commit listener
    _tried = 0  # transactions of the Session whose commit failed
    _prepared: tuple[tuple[AdoptedSession, Transactions], ...] = ()
    _doubtful: tuple[str, ...] = ()  # prepared transactions, whose outcome is unknown

    def __init__(self, sessions: Mapping[Any, AdoptedSession], *, final: bool = False) -> None:
        self._sessions = sessions
        self._final = final

    def run(self) -> None:
        """Commit.

        :raises BaseException: what SQLAlchemy, a driver or a listener raised; see
            :meth:`explain`. The caller rolls back.
        """
        begun = [(session, _refuse_spoiled(session)) for session in self._flush()]
        try:
            for session, found in begun:
                if session.twophase:
                    self._prepare(session, found)
            for session, found in begun:
                if not session.twophase:
                    self._commit(session, found)
        except BaseException:
            # Before their connections are invalidated: a prepared transaction survives that.
            for session, _ in self._prepared:
                undo(session, "rollback")
            raise
        failure: BaseException | None = None
        for session, found in self._prepared:
            # The decision has been made: each is committed, even if another fails.
            try:
                self._commit(session, found)
            except BaseException as error:
                failure = failure or error
                self._doubtful += _gids(found)
                # Somebody has to resolve it by hand: a rollback now would keep half of the work.
                undo(session, "invalidate")
        failure = failure or self._late
        if failure is not None:
            raise failure

    def _flush(self) -> list[AdoptedSession]:
        sessions = self._sessions
        flushed: list[AdoptedSession] = []
        for _ in range(100):  # after as many, SQLAlchemy's commit() raises
            again = False
            for session in list(sessions.values()):
                needs_flush = has_changes if session in flushed else is_begun
                if needs_flush(session):
                    session.flush()
                    flushed.append(session)
                    again = len(sessions) > 1  # a listener may have used each of them
            if not again:
                break
        if len(sessions) == 1:
            return flushed
        ordered = sorted(sessions, key=lambda each: each.number)
        return [sessions[each] for each in ordered if sessions[each] in flushed]

    def _prepare(self, session: AdoptedSession, found: Transactions) -> None:
        # commit() releases an open savepoint, but prepare() refuses it.
        while (savepoint := session.get_nested_transaction()) is not None:
            savepoint.commit()
        try:
            session.prepare()
        except BaseException as error:
            # SQLAlchemy 2.0.20 hides it, because it refuses its own rollback.
            hidden: Any = error.__context__
            is_hidden = hidden not in (None, getattr(error, "orig", None))
            if _leaves_open(error) or (is_hidden and _leaves_open(hidden)):
                self._doubtful += _gids(found)
            raise
        self._prepared += ((session, found),)

    def _commit(self, session: AdoptedSession, found: Transactions) -> None:
        expires = session.expire_on_commit
        if self._final:
            session.expire_on_commit = False
        session.dbsession_committed = False
        try:
            session.commit()
        except BaseException as error:
            if not session.dbsession_committed:
                self._tried = sum(not transaction.is_active for _, transaction in found)
                raise
            self._late = self._late or error
            undo(session, "close")  # SQLAlchemy leaves its transaction half-way
        finally:
            session.expire_on_commit = expires
        if not session.dbsession_committed:
            msg = f"{type(session).__name__}.commit() has returned, but has not committed"
            raise RuntimeError(msg)
        self._committed += 1

    def explain(self, failure: BaseException) -> tuple[Truth, str]:
        """Return the truth about a failed commit, and a sentence about it."""
        names = ", ".join(map(repr, self._doubtful))
        prepared = f"; prepared transactions: {names}" if names else ""
        if failure is self._late:
            return "committed", "committed, but something failed afterwards"
        if self._committed or self._tried > 1:
            done = self._committed or self._tried - 1
            return (
                "partly committed",
                f"partly committed, {done} transactions before the failed one{prepared}",
            )
        if self._doubtful or _leaves_open(failure):
            why = "connection lost during COMMIT, " if _leaves_open(failure) else ""
            return "unknown", f"{why}outcome unknown{prepared}"
        if any(map(is_autocommit, self._sessions.values())):
            return "rolled back", "commit failed, but AUTOCOMMIT keeps what was written"
        return "rolled back", "commit failed, rolled back"


def _refuse_spoiled(session: Session) -> Transactions:
    """Raise if the transaction cannot be committed any more, before others are committed."""
    found = connections(session)
    for connection, transaction in found:
        driver = None if connection.closed else connection.connection.dbapi_connection
        if driver is not None and transaction.is_active:
            if error := _spoiled.refusal(connection, driver):
                raise error
        elif session.is_active:
            raise exc.InvalidRequestError(_ENDED)
        else:  # a flush that fails rolls back all of them, or to a savepoint
            raise _spoiled.explain_refusal()
    if (not found or session.in_nested_transaction()) and not session.is_active:
        raise _spoiled.explain_refusal()
    return found


def _gids(found: Transactions) -> tuple[str, ...]:
    return tuple(str(getattr(transaction, "xid", "")) for _, transaction in found)


def _leaves_open(failure: BaseException) -> bool:
    """Return whether COMMIT, or one of its phases, failed without an answer."""
    # If SQLAlchemy cannot take back what it could not prepare, that error hides the first one.
    methods = ("do_commit", "do_prepare_twophase", "do_rollback_twophase")
    return _driver.passed_through(failure, *methods) and not _driver.is_refusal(failure)


def rollback(sessions: Iterable[Session], error: BaseException | None = None) -> None:
    """Roll back these Sessions.

    :param error: why. After a ``BaseException`` that is not an ``Exception`` (``GreenletExit``,
        ``gevent.Timeout``) the answer to a statement may still be on its way, so the connection
        is discarded: see ``Session.invalidate()`` in SQLAlchemy's documentation.
    :raises BaseException: the rollback was interrupted, and there is no earlier error.
    """
    interrupted = error is not None and not isinstance(error, Exception)
    interruption = None
    for session in list(sessions):  # a listener may ask for another one
        failure = undo(session, "invalidate" if interrupted else "rollback")
        interruption = interruption or failure
    if interruption is not None and error is None:
        raise interruption


def undo(session: Session, method: str) -> BaseException | None:
    """Call a method that ends what the Session has begun.

    A failure is logged only: the connection is closed then, and with it the database rolls back.

    :return: the failure if it is an interruption, an error that is not an ``Exception``.
    """
    try:
        getattr(session, method)()
    except BaseException as failure:
        log.warning("rollback failed, closing the connection instead", exc_info=True)
        with contextlib.suppress(Exception):
            session.invalidate()
        return None if isinstance(failure, Exception) else failure
    return None
