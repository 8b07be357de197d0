"""Isolation: all scopes work in one transaction, which is rolled back."""

from __future__ import annotations

import contextlib
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
from ._outsiders import refuse_open_transactions, refuse_outsiders
from ._shared import SharedConnection

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.orm import scoped_session, sessionmaker
    from sqlalchemy.pool import Pool

    from wsgi_dbsession._scope import Scope

    from ._outcomes import Recorded
    from ._savepoints import Savepoint


@contextlib.contextmanager
def isolate(*registries: scoped_session[Any], wait: float = 5) -> Generator[list[Recorded]]:
    """Roll back everything that is done in the block.

    ::

        with isolate(Session) as outcomes:
            client.post("/notes", data={"text": "gone soon"})
            assert outcomes[-1].outcome == "commit"

    Every request and every ``session_scope`` in the block uses one connection per engine, in one
    outer transaction. The application commits, rolls back, sets savepoints and fails in it as in
    production. Isolations can be nested: the inner one undoes its own work at its end.

    :param registries: the application's ``scoped_session`` objects.
    :param wait: how many seconds a transaction of another thread waits for its turn.
    :return: the outcomes of the scopes, see :func:`record_outcomes`.
    :raises TypeError: see :class:`wsgi_dbsession.session_scope`; or if a registry is bound to a
        Connection.
    :raises ValueError: likewise; or if a registry is not bound to an engine.
    :raises RuntimeError: at the start, if an active scope has a Session in a transaction.
    :raises RuntimeError: at the end, if a scope or a transaction is still open, or if a rollback
        has undone what another transaction had committed.
    :raises RuntimeError: at the end, if the outer transaction was lost, for example by a textual
        ``COMMIT``. Rows may remain in the database then.
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
    refuse_open_transactions(registry.session_factory for registry in checked)
    problems: list[str] = []
    with record_outcomes(*checked) as outcomes:
        isolation = Isolation(outcomes, wait)
        isolation.cleanup.callback(lambda: problems.extend(isolation.find_faults()))
        try:
            with isolation.cleanup:
                # Bind those of an outer isolation first: the others may share its connection.
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
    """Close the open scopes, so that later tests are unaffected, and return the problems.

    A response that a test client has read but not closed is not reported: its outcome is known.
    """
    if _open(outcomes):
        gc.collect()  # closes responses that are garbage in a reference cycle
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
    # Otherwise it is active in another thread or generator, where its next statement raises.


def _is_outside(registry: scoped_session[Any]) -> bool:
    return not isinstance(registry.session_factory.kw.get("bind"), IsolatedEngine)


class Isolation:
    """The connections of one ``isolate`` block, and the callbacks that restore the registries."""

    def __init__(self, outcomes: list[Recorded], wait: float) -> None:
        self.outcomes = outcomes
        self.cleanup = contextlib.ExitStack()
        self._wait = wait
        self._lock = threading.RLock()
        self._shared: dict[Pool, SharedConnection] = {}
        self._levels: dict[SharedConnection, Savepoint] = {}
        self._engines: dict[Engine, IsolatedEngine] = {}
        self._factories: set[sessionmaker[Any]] = set()

    @contextlib.contextmanager
    def open_scope(self, registries: tuple[scoped_session[Any], ...]) -> Generator[Scope]:
        """Open a scope for the test itself, and roll it back.

        If that undoes what requests have committed, it is not a problem: the test is over.
        """
        with session_scope(*registries, name="dbsession_scope") as scope:
            try:
                yield scope
            finally:
                scope.doom()
                for shared in self._levels:
                    shared.savepoints.reporting = False
        for shared in self._levels:
            shared.savepoints.reporting = True

    def bind(self, factory: sessionmaker[Any]) -> None:
        """Bind a session factory to the shared connections until the isolation ends."""
        if factory in self._factories:
            return
        self._factories.add(factory)
        bind, binds = factory.kw.get("bind"), factory.kw.get("binds")
        if bind is None:  # a Session class may have one, such as those of wsgi_dbsession.replica
            bind = getattr(factory.class_, "dbsession_bind", None)
        chooses = factory.class_.get_bind is not Session.get_bind
        if bind is None and not binds and not chooses:
            msg = (
                "a registry must be bound to an engine to be isolated, got None: call "
                "Session.configure(bind=engine) before isolate(Session)"
            )
            raise ValueError(msg)
        refuse_outsiders(factory, self.cleanup)
        if chooses:
            self._bind_choice(factory)
        bound: dict[str, Any] = {}
        if bind is not None:
            bound["bind"] = self.engine(bind)
        if binds:
            bound["binds"] = {key: self.engine(each) for key, each in binds.items()}
        before = {name: factory.kw.get(name) for name in bound}
        factory.configure(**bound)
        self.cleanup.callback(_restore, factory, bound, before)

    def _bind_choice(self, factory: sessionmaker[Any]) -> None:
        """Isolate the engines that the Session class's own ``get_bind()`` returns."""
        chooser = factory.class_
        isolated = self.engine

        def get_bind(self: Session, *arguments: Any, **options: Any) -> Engine:
            return isolated(chooser.get_bind(self, *arguments, **options))

        factory.class_ = type(chooser.__name__, (chooser,), {"get_bind": get_bind})
        self.cleanup.callback(setattr, factory, "class_", chooser)

    def engine(self, bind: Engine | Connection) -> IsolatedEngine:
        """Return the isolated engine that replaces this one."""
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
            if shared not in self._levels:
                self._open_level(shared)
            return engine
        # Engine.execution_options() returns an engine on the same pool.
        if engine.pool not in self._shared:
            shared = self._shared[engine.pool] = SharedConnection(engine, self._wait)
            self.cleanup.callback(shared.end)
            self._open_level(shared)
        return IsolatedEngine(engine, self._shared[engine.pool])

    def _open_level(self, shared: SharedConnection) -> None:
        self._levels[shared] = level = shared.open_level()
        self.cleanup.callback(shared.close_level, level)

    def find_open(self) -> list[str]:
        """Return the problems: the open transactions."""
        return [
            f"a transaction was never ended. It was begun at {transaction.opened}. Commit, "
            "roll back or close its Session or Connection"
            for shared, level in self._levels.items()
            for transaction in shared.open_transactions(level)
        ]

    def find_faults(self) -> list[str]:
        """Return the problems of the isolation itself. Call this last."""
        faults: list[str] = []
        for shared in self._levels:
            faults += shared.savepoints.problems
            shared.savepoints.problems.clear()
            if shared.loss.message is not None:
                faults.append(shared.loss.message)
        return faults


def _restore(factory: sessionmaker[Any], bound: dict[str, Any], before: dict[str, Any]) -> None:
    # The application may have configured another engine since, which must stay.
    factory.configure(**{k: v for k, v in before.items() if factory.kw.get(k) is bound[k]})
