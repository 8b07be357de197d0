"""The registry whose storage is the scope, and how a ``scoped_session`` is adopted.

``scoped_session`` keeps its Sessions in a ``ScopedRegistry``. An adopted one has a subclass of
it, so there is no process-wide dictionary, and a scope that is dropped takes its Sessions along.
"""

from __future__ import annotations

import itertools
import os
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import ScopedRegistry

from ._fork import forget_inherited
from ._hooks import open_savepoints
from ._pooler import warn_behind_pooler
from ._scope import Observer, current_scope, find_scope
from ._step import scopes
from ._transaction import AdoptedSession, has_changes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.orm import SessionTransaction

    from ._scope import Scope

_numbers = itertools.count()
_FIX = "Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)"


class SessionRegistry(ScopedRegistry[Session]):
    """Keeps the Sessions of one ``scoped_session`` on their scopes."""

    __slots__ = ("number", "observers")

    def __init__(self, factory: sessionmaker[Any]) -> None:
        super().__init__(factory, current_scope)
        self.number = next(_numbers)
        self.observers: tuple[Observer, ...] = ()

    def __call__(self) -> Session:
        """Return the scope's Session, a new one at first."""
        scope = current_scope()
        scope.context = copy_context()
        session = scope.sessions.get(self)
        if session is None:
            forget_inherited()
            made: Any = self.createfunc()  # adoption has made its class an AdoptedSession
            self.store(scope, session := made)
        return session

    def has(self) -> bool:
        """Return whether the scope has a Session; False outside of any scope."""
        scope = find_scope()
        return scope is not None and self in scope.sessions

    def set(self, obj: Session) -> None:
        """Make this the scope's Session.

        :raises TypeError: it was not made by the registry's factory.
        """
        scope = current_scope()
        if not isinstance(obj, AdoptedSession):
            msg = f"registry.set() must be given a Session of its factory, got {obj!r}"
            raise TypeError(f"{msg}. Make it by `Session.session_factory(...)`")
        scope.context = copy_context()
        self.clear()
        self.store(scope, obj)

    def clear(self) -> None:
        """Close the scope's Session, if there is one, and forget it."""
        scope = find_scope()
        session = None if scope is None else scope.sessions.get(self)
        if scope is not None and session is not None:
            session.close()  # a forgotten Session must not keep its connection
            scope.sessions.pop(self, None)

    def store(self, scope: Scope, session: AdoptedSession) -> None:
        """Keep a Session on the scope."""
        session.dbsession_scope = scope
        session.dbsession_pid = os.getpid()
        scope.sessions[self] = session
        if scope.releases:
            scope.releases[0].guard(session)
        if not scope.in_step:
            # Its step ended in another thread while the Session was being made.
            if scope.sessions.pop(self, None) is not None:
                session.close()
            current_scope()


def adopt(registries: Iterable[scoped_session[Any]]) -> tuple[SessionRegistry, ...]:
    """Make these registries keep their Sessions on the scope, from now on.

    :raises TypeError: one is not a ``scoped_session`` over a ``sessionmaker``.
    :raises ValueError: there is none, or one has another ``scopefunc``.
    """
    given = tuple(registries)
    if not given:
        msg = f"registries must not be empty. Pass the application's own: `{_FIX}`"
        raise ValueError(msg)
    for registry in given:
        _check(registry)
    return tuple(dict.fromkeys(map(_adopt, given)))


def _check(registry: scoped_session[Any]) -> None:
    kind: type = type(registry)  # callers without a type checker may pass anything
    fix = f"Make it by `{_FIX}`"
    if not issubclass(kind, scoped_session):
        if issubclass(kind, (list, tuple, set)):
            fix = "Pass each as its own argument: `SessionMiddleware(app, *registries)`"
        elif isinstance(getattr(registry, "__dict__", {}).get("session"), scoped_session):
            fix = "Pass its attribute `session`: `SessionMiddleware(app, db.session)`"
        msg = f"a session registry must be a scoped_session, got {registry!r}. {fix}"
        raise TypeError(msg)
    factory: Any = registry.session_factory
    if getattr(registry.registry, "scopefunc", None) is not current_scope:
        classes = getattr(factory, "class_", object).__mro__
        if any(each.__module__.startswith("flask_sqlalchemy.") for each in classes):
            fix = (
                "Write `SQLAlchemy(session_options={'scopefunc': current_scope})`, and after "
                "`db.init_app(app)` take out its teardown: `app.teardown_appcontext_funcs.pop()`"
            )
        # A thread-local registry has no scopefunc at all.
        msg = f"the scopefunc of a session registry must be current_scope, got {registry!r}. {fix}"
        raise ValueError(msg)
    if not isinstance(factory, sessionmaker):
        msg = f"the factory of a session registry must be a sessionmaker, got {factory!r}"
        raise TypeError(f"{msg}. {fix}")


def _adopt(registry: scoped_session[Any]) -> SessionRegistry:
    adopted = registry.registry
    if not isinstance(adopted, SessionRegistry):
        factory: sessionmaker[Any] = registry.session_factory
        kind = factory.class_  # read once: another thread may adopt the same registry
        if not issubclass(kind, AdoptedSession):
            # sessionmaker has derived its own class, so listeners see no other Sessions.
            attributes: dict[str, Any] = {"dbsession_lines": set()}
            factory.class_ = type(kind.__name__, (AdoptedSession, kind), attributes)
            # They run before those of the application, which may raise.
            event.listen(factory, "after_commit", _after_commit, insert=True)
            event.listen(factory, "after_flush", _after_flush, insert=True)
            event.listen(factory, "after_soft_rollback", _after_rollback, insert=True)
            event.listen(factory, "after_transaction_create", _after_begin, insert=True)
        adopted = registry.registry = SessionRegistry(factory)
        warn_behind_pooler()
    return adopted


def _after_begin(session: AdoptedSession, transaction: SessionTransaction) -> None:
    """Tell the scope of a Session, also if the application has closed and kept it."""
    own = session.dbsession_scope
    if own is None:
        return
    if not own.in_step or session not in own.sessions.values():
        scope = find_scope()
        if scope is not None and own not in scopes():
            transaction.close()  # or the next statement would not begin one, and pass
            msg = (
                f"{scope.name}: nothing would commit a Session that was kept from another scope. "
                "Keep the scoped_session, and not what `Session()` returns"
            )
            raise RuntimeError(msg)
        if scope is not None:  # Session.remove() has closed it
            SessionRegistry(sessionmaker()).store(own, session)
    own.context = own.context or copy_context()


def _after_commit(session: AdoptedSession) -> None:
    if not session.in_nested_transaction():
        session.dbsession_committed = True
        session.dbsession_flushed, session.dbsession_undone = None, False


def _after_flush(session: AdoptedSession, _: object) -> None:
    # No later flush outlives the first one.
    if session.dbsession_flushed is None and has_changes(session):
        session.dbsession_flushed = open_savepoints(session)


def _after_rollback(session: AdoptedSession, transaction: SessionTransaction) -> None:
    ended = transaction
    while ended.parent is not None and not ended.nested:
        ended = ended.parent  # a flush that fails rolls back the savepoint that it is in
    if transaction.parent is None:
        session.dbsession_flushed, session.dbsession_undone = None, False
    elif ended.nested:
        session.dbsession_undone = True
        if ended in (session.dbsession_flushed or ()):
            session.dbsession_flushed = None
        if session.dbsession_scope is not None:
            session.dbsession_scope.drop_hooks(ended)


def check_routed(registries: Iterable[SessionRegistry]) -> None:
    """Check that these registries route a read-only scope to an engine that refuses writes.

    :raises ValueError: a Session class has no attribute ``dbsession_routed``, with which a class
        declares that its ``get_bind()`` respects ``Scope.read_only``.
    """
    for registry in registries:
        factory: Any = registry.createfunc
        if not hasattr(factory.class_, "dbsession_routed"):
            msg = (
                f"read_only must be False for {factory.class_.__name__}, got True. Make its class "
                "by session_class() or Replicas of wsgi_dbsession.replica, or nothing would "
                "refuse writes"
            )
            raise ValueError(msg)


def observers_of(
    registries: Iterable[SessionRegistry], first: tuple[Observer, ...] = ()
) -> tuple[Observer, ...]:
    """Return the `first` observers and then those of the registries, each once."""
    found = first
    for registry in registries:
        for observer in registry.observers:
            if observer not in found:
                found += (observer,)
    return found


class observe:  # noqa: N801 - used like contextlib's context managers
    """Call an observer for every scope whose middleware or block has this registry.

    It begins at once. As a context manager it stops at the end of the block::

        with observe(Session, observer):
            client.post("/notes")

    :param registry: the application's ``scoped_session``.
    :param observer: an :class:`Observer`.
    :raises TypeError: it is not an Observer, or see :class:`session_scope`.
    :raises ValueError: see :class:`session_scope`.
    """

    def __init__(self, registry: scoped_session[Any], observer: Observer) -> None:
        check_observers((observer,))
        self._observer = observer
        (self._registry,) = adopt((registry,))
        self._registry.observers += (observer,)

    def __enter__(self) -> Observer:
        return self._observer

    def __exit__(self, *_: object) -> None:
        left = list(self._registry.observers)
        left.remove(self._observer)
        self._registry.observers = tuple(left)


def check_observers(observers: Iterable[Observer]) -> tuple[Observer, ...]:
    """Return the observers.

    :raises TypeError: one is not an Observer.
    """
    found = tuple(dict.fromkeys(observers))
    for observer in found:
        kind: type = type(observer)
        if not issubclass(kind, Observer):
            msg = f"an observer must be an instance of Observer, got {observer!r}"
            raise TypeError(f"{msg}. Derive its class from wsgi_dbsession.Observer")
    return found
