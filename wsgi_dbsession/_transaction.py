"""Flush, prepare, commit, roll back and remove the Sessions of several registries.

This floor knows SQLAlchemy only: a key of a registry is any object here.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc

from ._fork import connections

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy.orm import Session, scoped_session

log = logging.getLogger("wsgi_dbsession")

_INERROR = 3  # PQTRANS_INERROR of libpq, as psycopg and psycopg2 show it


def find(registries: Iterable[scoped_session[Any]], key: object) -> list[Session]:
    """Return the Sessions that exist under this key; make none."""
    sessions: list[Session] = []
    for registry in registries:
        session = registry.registry.registry.get(key)
        if session is not None:
            sessions.append(session)
    return sessions


def is_begun(registries: Iterable[scoped_session[Any]], key: object) -> bool:
    """Say whether a Session under this key is in a transaction."""
    for registry in registries:  # any() would be two calls more, for every request
        session = registry.registry.registry.get(key)
        if session is not None and session.in_transaction():
            return True
    return False


def commit(sessions: Sequence[Session]) -> None:
    """Commit whatever transactions these Sessions have begun, all or none as far as it goes.

    All are flushed before the first is committed; two-phase ones are prepared, then one-phase
    ones are committed, then the prepared ones. Nothing asks for changed objects: a transaction
    that was begun is committed, because textual SQL leaves no other trace.

    :raises Exception: what SQLAlchemy or the driver raised; the caller rolls back.
    """
    if len(sessions) == 1:
        (session,) = sessions
        if session.in_transaction():
            _refuse_failed(session)
            session.commit()
        return
    for session in sessions:
        if session.in_transaction():
            session.flush()
    begun = [session for session in sessions if session.in_transaction()]
    for session in begun:
        _refuse_failed(session)
    two_phase = [session for session in begun if session.twophase]
    prepared: list[Session] = []
    try:
        for session in two_phase:
            # prepare() refuses an open savepoint, where commit() ends it with the rest.
            while (savepoint := session.get_nested_transaction()) is not None:
                savepoint.commit()
            session.prepare()
            prepared.append(session)
        for session in begun:
            if session not in two_phase:
                session.commit()
        for session in prepared:
            session.commit()
    except BaseException:
        # Before anybody invalidates them: a prepared transaction survives its connection.
        for session in prepared:
            _undo(session, "rollback")
        raise


def _refuse_failed(session: Session) -> None:
    """Raise if the transaction cannot be committed any more.

    After a failed statement, PostgreSQL answers COMMIT with ROLLBACK, and psycopg and psycopg2 do
    not report it: an error that the application caught would turn into a success that saved
    nothing. After a failed flush, SQLAlchemy reports it, but not before others are committed.
    """
    failed = not session.is_active
    for connection in connections(session):
        if connection.dialect.name == "postgresql" and connection.in_transaction():
            driver = connection.connection.dbapi_connection
            status = getattr(getattr(driver, "info", None), "transaction_status", None)
            failed = failed or status == _INERROR
    if failed:
        msg = (
            "cannot commit: a statement failed in this transaction, and the application caught "
            "the error without a rollback. Put the statement that may fail into "
            "`with Session.begin_nested():`, or call Session.rollback() where the error is caught"
        )
        raise exc.PendingRollbackError(msg)


def is_unknown(failure: BaseException) -> bool:
    """Say whether the connection broke during COMMIT: nobody knows if that took place.

    Then the error has no statement; a flush that failed on the way to the commit has one. After an
    interruption, which is no ``Exception``, it is not even known whether the COMMIT was sent.
    """
    return not isinstance(failure, Exception) or (
        isinstance(failure, exc.DBAPIError)
        and failure.connection_invalidated
        and failure.statement is None
    )


def rollback(sessions: Iterable[Session], error: BaseException | None = None) -> None:
    """Roll back these Sessions.

    :param error: why. After a ``BaseException`` that is no ``Exception`` (``GreenletExit``,
        ``gevent.Timeout``) the answer to a statement may still be on its way, so the connection
        is thrown away: see ``Session.invalidate()`` in SQLAlchemy's documentation.
    :raises BaseException: the rollback was interrupted, and there is no earlier error.
    """
    interrupted = error is not None and not isinstance(error, Exception)
    interruption = None
    for session in sessions:
        connections(session)  # so that a fork knows them, though nothing is ever committed
        failure = _undo(session, "invalidate" if interrupted else "rollback")
        interruption = interruption or failure
    if interruption is not None and error is None:
        raise interruption


def remove(registries: Iterable[scoped_session[Any]], key: object) -> BaseException | None:
    """Close the Sessions under this key and forget them, each though another fails.

    Not ``scoped_session.remove()``: that keeps a Session whose ``close()`` raised.

    :return: the first interruption, see :func:`_undo`.
    """
    interruption = None
    for registry in registries:
        session = registry.registry.registry.pop(key, None)
        if session is not None:
            failure = _undo(session, "close")
            interruption = interruption or failure
    return interruption


def _undo(session: Session, method: str) -> BaseException | None:
    """End what the Session has begun.

    A failure is logged only: the connection is closed then, and with it the database rolls back.

    :return: the failure if it is an interruption, an error that is no ``Exception``.
    """
    try:
        getattr(session, method)()
    except BaseException as failure:
        log.warning("rollback failed, the connection is closed instead", exc_info=True)
        with contextlib.suppress(Exception):
            session.invalidate()
        return None if isinstance(failure, Exception) else failure
    return None
