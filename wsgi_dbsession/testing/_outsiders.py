"""Sessions that work outside of an isolation, because they were made before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, event

from wsgi_dbsession._step import scopes
from wsgi_dbsession._transaction import AdoptedSession, connections, has_written

from ._engine import IsolatedEngine

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterable

    from sqlalchemy.orm import Session, SessionTransaction, sessionmaker


def refuse_begun(factories: Iterable[sessionmaker[Any]]) -> None:
    """Refuse an isolation in a scope whose Session has begun a transaction.

    Not everything that it may do on the connection that it has calls a listener.

    :raises RuntimeError: there is such a Session.
    """
    classes = tuple(factory.class_ for factory in factories)
    for scope in scopes():
        for session in scope.sessions.values():
            if isinstance(session, classes):
                _refuse_session(session)


def refuse_later(factory: sessionmaker[Any], undone: contextlib.ExitStack) -> None:
    """Refuse what a Session of this factory does outside of the isolation.

    :param undone: ends that.
    """
    kind = factory.class_
    while issubclass(kind, AdoptedSession):  # a Session may be older than the adoption
        kind = kind.__bases__[-1]

    # Functions of its own, because an isolation inside of this one removes those of its own.
    def after_begin(
        session: Session, transaction: SessionTransaction, connection: Connection
    ) -> None:
        _refuse_connection(connection)

    def before_flush(session: Session, context: object, instances: object) -> None:
        _refuse_session(session)

    def before_commit(session: Session) -> None:
        outside = any(not _is_isolated(connection) for connection, _ in connections(session))
        # The end of a transaction that has only read leaves nothing behind.
        if outside and has_written(session) is not False:
            _refuse_session(session)

    for listener in (after_begin, before_flush, before_commit):
        event.listen(kind, listener.__name__, listener)
        undone.callback(event.remove, kind, listener.__name__, listener)


def _refuse_session(session: Session) -> None:
    for connection, _ in connections(session):
        _refuse_connection(connection)


def _refuse_connection(connection: Connection) -> None:
    if not _is_isolated(connection):
        msg = (
            f"a Session uses {connection.engine!r} past the isolation. It was made before "
            "isolate(), or its registry was bound to an engine after that: begin the "
            "isolation when the application is made, and outside of any scope"
        )
        raise RuntimeError(msg)


def _is_isolated(connection: Connection) -> bool:
    return isinstance(connection.engine, IsolatedEngine)
