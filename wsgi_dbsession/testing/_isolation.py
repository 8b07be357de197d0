"""Isolation: every scope in one transaction that is rolled back."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from wsgi_dbsession._block import session_scope
from wsgi_dbsession._registry import adopt
from wsgi_dbsession._report import log
from wsgi_dbsession._scope import find_scope

from ._engine import IsolatedEngine
from ._outcomes import record_outcomes
from ._outsiders import refuse_begun, refuse_later
from ._shared import SharedConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sqlalchemy.orm import scoped_session, sessionmaker
    from sqlalchemy.pool import Pool

    from wsgi_dbsession._scope import Scope

    from ._outcomes import Recorded
    from ._savepoints import IsolatedTransaction


@contextlib.contextmanager
def isolate(*registries: scoped_session[Any], wait: float = 5) -> Generator[list[Recorded]]:
    """Roll back at the end whatever is done in the block.

    ::

        with isolate(Session) as outcomes:
            client.post("/notes", data={"text": "gone soon"})
            assert outcomes[-1].outcome == "commit"

    Every request and every ``session_scope`` in the block works on one connection for each engine,
    in one outer transaction. There the application commits, rolls back, sets savepoints and fails
    as in production. In an isolation inside of another one, the inner one's work is undone first.

    :param registries: the application's ``scoped_session`` objects.
    :param wait: how many seconds a transaction of another thread waits for its turn.
    :return: the outcomes of the scopes, see :func:`record_outcomes`.
    :raises TypeError: see :class:`wsgi_dbsession.session_scope`; or if a registry is bound to a
        Connection.
    :raises ValueError: likewise; or if a registry is not bound to an engine.
    :raises RuntimeError: at once, if an active scope has a Session whose transaction has begun; or
        at the end of the block, if a scope or a transaction was left open, if a rollback has
        undone what another transaction had committed, or if the outer transaction was ended, so
        that rows remain in the database.
    """
    with open_isolation(registries, wait) as isolation:
        yield isolation.outcomes


@contextlib.contextmanager
def open_isolation(
    registries: tuple[scoped_session[Any], ...], wait: float = 5
) -> Generator[Isolation]:
    """Do the same as :func:`isolate`, and return the isolation itself."""
    adopt(registries)
    checked = tuple(dict.fromkeys(registries))
    refuse_begun(registry.session_factory for registry in checked)
    problems: list[str] = []
    with record_outcomes(*checked) as outcomes:
        isolation = Isolation(outcomes, wait)
        isolation.undone.callback(lambda: problems.extend(isolation.find_faults()))
        try:
            with isolation.undone:
                # First those that another isolation has bound: the rest may share its connection.
                for registry in sorted(checked, key=_is_outside):
                    isolation.bind(registry.session_factory)
                try:
                    yield isolation
                finally:
                    problems += _end_scopes(outcomes)
                    problems += isolation.find_open()
        except BaseException:
            for problem in problems:
                log.error("%s", problem)
            raise
    if problems:
        raise RuntimeError("\n".join(problems))


def _end_scopes(outcomes: list[Recorded]) -> list[str]:
    """End the scopes that are open, so that later tests are unaffected.

    A response that a test client has read but not closed is not reported: its outcome is known.
    """
    if _open(outcomes):
        gc.collect()  # which closes responses that nothing but a cycle refers to
    problems = [
        f"the scope of {record.name} was never ended. It was opened at {record.opened}. "
        "Close the response of a request, and leave a session_scope block"
        for record in _open(outcomes)
    ]
    for record in reversed(outcomes):
        if record.scope is not None:
            _abandon(record.scope)
    return problems


def _open(outcomes: list[Recorded]) -> list[Recorded]:
    return [
        each
        for each in outcomes
        if each.scope is not None and (each.scope.in_step or each.scope.undecided())
    ]


def _abandon(scope: Scope) -> None:
    if not scope.in_step:
        try:
            scope.enter()
            scope.close(complete=False)
        finally:
            scope.leave()
    elif find_scope() is scope:
        try:
            scope.close(complete=False)
        finally:
            scope.leave_block()
    # Else it is active in another thread or generator, and its next statement raises.


def _is_outside(registry: scoped_session[Any]) -> bool:
    return not isinstance(registry.session_factory.kw.get("bind"), IsolatedEngine)


class Isolation:
    """The connections of one ``isolate`` block, and how to get back to what was before."""

    def __init__(self, outcomes: list[Recorded], wait: float) -> None:
        self.outcomes = outcomes
        self.undone = contextlib.ExitStack()
        self._wait = wait
        self._lock = threading.RLock()
        self._shared: dict[Pool, SharedConnection] = {}
        self._unended: dict[SharedConnection, Callable[[], list[IsolatedTransaction]]] = {}
        self._engines: dict[Engine, IsolatedEngine] = {}
        self._factories: set[sessionmaker[Any]] = set()

    @contextlib.contextmanager
    def open_scope(self, registries: tuple[scoped_session[Any], ...]) -> Generator[Scope]:
        """Open a scope for the test itself, and roll it back.

        If that undoes what requests have committed, it is not reported: the test is over.
        """
        with session_scope(*registries, name="dbsession_scope") as scope:
            try:
                yield scope
            finally:
                scope.doom()
                for shared in self._unended:
                    shared.savepoints.reporting = False
        for shared in self._unended:
            shared.savepoints.reporting = True

    def bind(self, factory: sessionmaker[Any]) -> None:
        """Bind a session factory to the shared connections until the end."""
        if factory in self._factories:
            return
        self._factories.add(factory)
        bind, binds = factory.kw.get("bind"), factory.kw.get("binds")
        if bind is None:  # a class of Sessions may have one, as those of wsgi_dbsession.replica
            bind = getattr(factory.class_, "dbsession_bind", None)
        chooses = factory.class_.get_bind is not Session.get_bind
        if bind is None and not binds and not chooses:
            msg = (
                "a registry must be bound to an engine to be isolated, got None: call "
                "Session.configure(bind=engine) before isolate(Session)"
            )
            raise ValueError(msg)
        refuse_later(factory, self.undone)
        if chooses:
            self._bind_choice(factory)
        bound: dict[str, Any] = {}
        if bind is not None:
            bound["bind"] = self.engine(bind)
        if binds:
            bound["binds"] = {key: self.engine(each) for key, each in binds.items()}
        before = {name: factory.kw.get(name) for name in bound}
        factory.configure(**bound)
        self.undone.callback(_restore, factory, bound, before)

    def _bind_choice(self, factory: sessionmaker[Any]) -> None:
        """Isolate what ``get_bind()`` returns, where the Session class has one of its own."""
        chooser = factory.class_
        isolated = self.engine

        def get_bind(self: Session, *arguments: Any, **options: Any) -> Engine:
            return isolated(chooser.get_bind(self, *arguments, **options))

        factory.class_ = type(chooser.__name__, (chooser,), {"get_bind": get_bind})
        self.undone.callback(setattr, factory, "class_", chooser)

    def engine(self, bind: Engine | Connection) -> IsolatedEngine:
        """Return the isolated engine in place of this one."""
        if isinstance(bind, Connection):
            msg = (
                f"a registry must be bound to an engine to be isolated, got {bind!r}: call "
                "Session.configure(bind=engine) before isolate(Session)"
            )
            raise TypeError(msg)
        with self._lock:
            isolated = self._engines.get(bind)
            if isolated is None:
                isolated = self._engines[bind] = self._isolate(bind)
            return isolated

    def _isolate(self, engine: Engine) -> IsolatedEngine:
        if isinstance(engine, IsolatedEngine):
            self._shared[engine.pool] = shared = engine.shared
            if shared not in self._unended:
                self._open_level(shared)
            return engine
        # Engine.execution_options() makes engines that share a pool, and so its connections.
        if engine.pool not in self._shared:
            shared = self._shared[engine.pool] = SharedConnection(engine, self._wait)
            self.undone.callback(shared.end)
            self._open_level(shared)
        return IsolatedEngine(engine, self._shared[engine.pool])

    def _open_level(self, shared: SharedConnection) -> None:
        level = shared.open_level()
        self.undone.callback(shared.close_level, level)
        self._unended[shared] = functools.partial(shared.unended, level)

    def find_open(self) -> list[str]:
        """Return which transactions are open."""
        return [
            f"a transaction was never ended. It was begun at {transaction.opened}. Commit, "
            "roll back or close its Session or Connection"
            for unended in self._unended.values()
            for transaction in unended()
        ]

    def find_faults(self) -> list[str]:
        """Return what was not isolated. Call it when everything else is done."""
        faults: list[str] = []
        for shared in self._unended:
            faults += shared.savepoints.problems
            shared.savepoints.problems.clear()
            if shared.loss.message is not None:
                faults.append(shared.loss.message)
        return faults


def _restore(factory: sessionmaker[Any], bound: dict[str, Any], before: dict[str, Any]) -> None:
    # Not what the application has configured itself meanwhile.
    factory.configure(**{k: v for k, v in before.items() if factory.kw.get(k) is bound[k]})
