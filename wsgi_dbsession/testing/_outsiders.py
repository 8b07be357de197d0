"""Refuse Sessions that are outside of an isolation, for example because they are older."""

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


def refuse_open_transactions(factories: Iterable[sessionmaker[Any]]) -> None:
    """Check that no active scope has a Session of these factories in a transaction.

    Such a Session keeps its connection, and could write on it without calling a listener.

    :raises RuntimeError: a scope has such a Session.
    """
    classes = tuple(factory.class_ for factory in factories)
    for scope in scopes():
        for session in scope.sessions.values():
            if isinstance(session, classes):
                _refuse_session(session)


def refuse_outsiders(factory: sessionmaker[Any], cleanup: contextlib.ExitStack) -> None:
    """Make Sessions of this factory raise if they work outside of the isolation.

    :param cleanup: removes the listeners.
    """
    kind = factory.class_
    while issubclass(kind, AdoptedSession):  # the base class: a Session may precede adopt()
        kind = kind.__bases__[-1]

    # New functions at each call: a nested isolation removes its listeners, and only its own.
    def after_begin(
        session: Session, transaction: SessionTransaction, connection: Connection
    ) -> None:
        _refuse_connection(connection)

    def before_flush(session: Session, context: object, instances: object) -> None:
        _refuse_session(session)

    def before_commit(session: Session) -> None:
        outside = any(not _is_isolated(connection) for connection, _ in connections(session))
        # A transaction that has only read may end.
        if outside and has_written(session) is not False:
            _refuse_session(session)

    for listener in (after_begin, before_flush, before_commit):
        event.listen(kind, listener.__name__, listener)
        cleanup.callback(event.remove, kind, listener.__name__, listener)


def _refuse_session(session: Session) -> None:
    for connection, _ in connections(session):
        _refuse_connection(connection)


def _refuse_connection(connection: Connection) -> None:
    if not _is_isolated(connection):
        msg = (
            f"a Session uses {connection.engine!r} outside of the isolation. It was made before "
            "isolate(), or its registry was bound to an engine after that: begin the isolation "
            "after the application is configured, and outside of any scope"
        )
        raise RuntimeError(msg)


def _is_isolated(connection: Connection) -> bool:
    return isinstance(connection.engine, IsolatedEngine)
