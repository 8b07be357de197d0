"""Sessions that choose the connection of each transaction: the primary's or a read-only one."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sqlalchemy import event
from sqlalchemy.orm import Session

from wsgi_dbsession._driver import is_read_only
from wsgi_dbsession._scope import find_scope
from wsgi_dbsession._step import scopes

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIEnvironment
    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import SessionTransaction

    from wsgi_dbsession._scope import Scope


def has_safe_method(environ: WSGIEnvironment) -> bool:
    """Return whether a request only reads: its method is GET or HEAD.

    :param environ: the request's environ.
    """
    return environ.get("REQUEST_METHOD") in {"GET", "HEAD"}


class Connect(Protocol):
    """Opens the connection for a transaction that only reads."""

    def __call__(self, *, required: bool) -> Connection | None:
        """Return a connection, or None to use the primary as for a write.

        :param required: whether the scope was made read-only explicitly: then return a connection
            on which the server refuses writes.
        """


class Router:
    """The rule by which the Sessions of one class choose a connection."""

    __slots__ = ("connect", "primary", "when")

    def __init__(
        self, primary: Engine, connect: Connect, when: Callable[[WSGIEnvironment], bool]
    ) -> None:
        if not callable(when):
            msg = f"when must be callable, got {when!r}. Pass a function of the environ."
            raise TypeError(msg)
        self.primary = primary
        self.connect = connect
        self.when = when

    def reads(self, scope: Scope | None) -> bool | None:
        """Return whether a scope only reads, None if ``when`` has decided so."""
        if scope is None:
            return False
        if scope.read_only is not None:
            return scope.read_only
        environ = scope.environ
        return None if environ is not None and self.when(environ) else False

    def session_class(self) -> type[Session]:
        """Make a class of Sessions for ``sessionmaker(class_=...)``."""
        attributes = {"dbsession_router": self, "dbsession_bind": self.primary}
        return type("RoutedSession", (RoutedSession,), attributes)


def is_retried() -> bool:
    """Return whether a current request is a further attempt of RetryMiddleware."""
    return any(
        scope.environ is not None and scope.environ.get("wsgi_dbsession.attempt", 1) > 1
        for scope in scopes()
    )


class RoutedSession(Session):
    """A Session that uses the primary or a read-only connection for each transaction.

    It decides in ``get_bind()``, before the first statement of the transaction. It only routes
    statements that would use the primary: those with other binds are unaffected.
    """

    dbsession_routed = True
    dbsession_router: ClassVar[Router]
    dbsession_bind: ClassVar[Engine]  # the primary, for isolate(), which binds Sessions elsewhere

    def __init__(self, bind: Engine | Connection | None = None, **options: Any) -> None:
        super().__init__(bind or self.dbsession_bind, **options)
        # The scope for which the decision was made, and what Router.reads() returned for it.
        self._dbsession_decided: tuple[Callable[[], Scope | None], bool | None] | None = None
        self._dbsession_reading: Connection | None = None

    def get_bind(self, mapper: Any = None, **arguments: Any) -> Engine | Connection:
        """Return the bind of a statement, see ``Session.get_bind()``."""
        bind = super().get_bind(mapper, **arguments)
        if (
            bind is not self.dbsession_bind
            or arguments.get("bind") is not None  # the application chooses the primary explicitly
            or self.twophase  # a read-only connection cannot prepare a transaction
        ):
            return bind
        if self._dbsession_decided is None or not self.in_transaction():
            self._dbsession_decide()
        return bind if self._dbsession_reading is None else self._dbsession_reading

    def close(self) -> None:
        """Close the Session, see ``Session.close()``."""
        try:
            super().close()
        finally:
            self.dbsession_release()

    def reset(self) -> None:
        """Close the Session for another use, see ``Session.reset()``."""
        try:
            super().reset()
        finally:
            self.dbsession_release()

    def invalidate(self) -> None:
        """Close the Session and its connections, see ``Session.invalidate()``."""
        try:
            super().invalidate()
        finally:
            self.dbsession_release()

    def dbsession_release(self) -> None:
        """Close the read-only connection, which the Session itself does not do."""
        self._dbsession_decided = None
        connection, self._dbsession_reading = self._dbsession_reading, None
        if connection is not None:
            connection.close()

    def _dbsession_decide(self) -> None:
        scope = find_scope()
        reads = self.dbsession_router.reads(scope)
        if self._dbsession_decided is not None:
            # get_bind() was called before, but no transaction has begun.
            decided_for, decision = self._dbsession_decided
            if decided_for() is scope and decision is reads:
                return
            self.dbsession_release()
        if reads is not False:
            self._dbsession_reading = self.dbsession_router.connect(required=reads is True)
        self._dbsession_decided = (_nothing if scope is None else weakref.ref(scope), reads)


def _nothing() -> None:
    return None


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None and isinstance(session, RoutedSession):
        session.dbsession_release()


event.listen(RoutedSession, "after_transaction_end", _after_transaction_end)


def session_class(
    engine: Engine,
    reads: Engine,
    *,
    when: Callable[[WSGIEnvironment], bool] = has_safe_method,
) -> type[Session]:
    """Make a class of Sessions that use another engine in scopes that only read.

    ::

        reads = read_only_engine(engine)
        Session = scoped_session(
            sessionmaker(class_=session_class(engine, reads)), scopefunc=current_scope
        )

    A scope only reads if ``when`` returns True for its request. ``scope.read_only`` and
    ``session_scope(Session, read_only=True)`` take precedence. A further attempt of
    RetryMiddleware at a safe request uses ``engine``.

    :param engine: the engine of all other scopes.
    :param reads: the engine of scopes that only read, made by :func:`read_only_engine`.
    :param when: called with a request's environ, returns whether the request only reads.
    :return: a class for ``sessionmaker(class_=...)``, or to derive your own from.
    :raises TypeError: ``when`` is not callable.
    :raises ValueError: ``reads`` was not made by :func:`read_only_engine`.
    """
    if not is_read_only(reads):
        msg = f"reads must be made by read_only_engine(), got {reads!r}. Pass it the engine's URL."
        raise ValueError(msg)

    def connect(*, required: bool) -> Connection | None:
        return reads.connect() if required or not is_retried() else None

    return Router(engine, connect, when).session_class()
