"""Random programs of requests do to the database and to the client what the design says."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import shutil
import sqlite3
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event, insert, null, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.models import Base, Book, Database, Note, make_engine
from tests.programs import (
    Application,
    Exchange,
    Hook,
    Interruption,
    Plan,
    RegistryName,
    Statement,
    environ_for,
    name_of,
    plans,
)
from tests.reference import ORPHAN, Model, Setup, say_sorry, veto
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine

# The same programs in each run. `HYPOTHESIS_PROFILE=night` is for others, and many of them.
settings.register_profile(
    "programs",
    max_examples=2000,
    stateful_step_count=6,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "night", settings.get_profile("programs"), max_examples=100_000, derandomize=False
)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "programs"))

Step: TypeAlias = Literal["here", "in another context", "in another thread"]
STEPS: tuple[Step, ...] = (*("here", "in another context") * 4, "in another thread")

# The lane of a scope, which is its number in the program, and one of its registries.
Place: TypeAlias = "tuple[int, RegistryName]"

COMMITTED = f"SELECT text FROM note UNION ALL SELECT '{ORPHAN}' FROM book"
CLEAR = ("DELETE FROM note", "DELETE FROM book")
PREPARED = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"


# -- databases ------------------------------------------------------------------------------------


class Files:
    """SQLite: a file for each scope and registry, because of two writers one would have to wait.

    So it shows as well which scope a row was written in.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._generation = 0
        self._engines: dict[Place, Engine] = {}
        self._observers: dict[Place, sqlite3.Connection] = {}
        self._used: set[Place] = set()
        self._empty = directory / "empty.db"
        empty = make_engine(f"sqlite:///{self._empty}")
        Base.metadata.create_all(empty)
        empty.dispose()

    def adapt(self, setup: Setup) -> Setup:
        return replace(setup, twophase=(), aborts=False)

    def place(self, place: Place) -> Place:
        """Return where the rows of a scope and registry are."""
        return place

    def engine(self, place: Place) -> Engine:
        self._used.add(place)
        if place not in self._engines:
            lane, registry = place
            path = self._directory / f"{self._generation}{registry}{lane}.db"
            shutil.copyfile(self._empty, path)
            self._engines[place] = make_engine(f"sqlite:///{path}")
            self._observers[place] = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False
            )
            self._observers[place].execute("PRAGMA synchronous=OFF")
        return self._engines[place]

    def committed(self) -> dict[Place, list[str]]:
        return {
            place: [label for (label,) in self._observers[place].execute(COMMITTED)]
            for place in self._used
        }

    def checked_out(self) -> int:
        return sum(checked_out(self._engines[place]) for place in self._used)

    def prepared(self) -> list[str]:
        return []

    def clear(self) -> None:
        for place in self._used:
            for statement in CLEAR:
                self._observers[place].execute(statement)
        self._used.clear()

    def dispose(self) -> None:
        """Start afresh: what a failed program left would disturb those after it."""
        for observer in self._observers.values():
            observer.close()
        for engine in self._engines.values():
            engine.dispose()
        self._observers.clear()
        self._engines.clear()
        self._used.clear()
        self._generation += 1


class Servers:
    """PostgreSQL: a database for each registry."""

    def __init__(self, databases: dict[RegistryName, Database]) -> None:
        self._engines = {
            (0, name): make_engine(database.url, pool_size=30)
            for name, database in databases.items()
        }
        self._observers = {
            place: database.observer.connect().execution_options(isolation_level="AUTOCOMMIT")
            for place, database in zip(self._engines, databases.values(), strict=True)
        }

    def adapt(self, setup: Setup) -> Setup:
        return replace(setup, aborts=True)

    def place(self, place: Place) -> Place:
        return (0, place[1])

    def engine(self, place: Place) -> Engine:
        return self._engines[self.place(place)]

    def committed(self) -> dict[Place, list[str]]:
        return {
            place: list(observer.exec_driver_sql(COMMITTED).scalars())
            for place, observer in self._observers.items()
        }

    def checked_out(self) -> int:
        return sum(checked_out(engine) for engine in self._engines.values())

    def prepared(self) -> list[str]:
        """Return the transactions that wait for the second phase."""
        return [
            name
            for observer in self._observers.values()
            for name in observer.exec_driver_sql(PREPARED).scalars()
        ]

    def clear(self) -> None:
        for observer in self._observers.values():
            for statement in CLEAR:
                observer.exec_driver_sql(statement)

    def dispose(self) -> None:
        for engine in self._engines.values():
            engine.dispose()
        for observer in self._observers.values():
            observer.exec_driver_sql(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            for name in observer.exec_driver_sql(PREPARED).scalars().all():
                observer.exec_driver_sql(f"ROLLBACK PREPARED '{name}'")
            for statement in CLEAR:
                observer.exec_driver_sql(statement)

    def close(self) -> None:
        self.dispose()
        for observer in self._observers.values():
            observer.close()


def checked_out(engine: Engine) -> int:
    pool: Any = engine.pool
    count: int = pool.checkedout()
    return count


class World:
    """The package, the registries over real databases, and the acts of the application there."""

    def __init__(self, setup: Setup, databases: Files | Servers) -> None:
        self.setup = setup
        self.databases = databases
        self.registries = {name: self._registry(name) for name in setup.registries}
        self.lanes = 0
        self.hooks_run: list[str] = []
        self.log: list[str] = []
        self.lost: list[str] = []
        self.asked: list[Exchange] = []
        self.violations: list[str] = []
        # What a scope has written and not taken back, to check the rule without the model.
        self.written: dict[int, dict[RegistryName, list[str]]] = {}
        self.doomed: set[int] = set()
        app: WSGIApplication = Application(self)
        options: Any = {
            "commit_on": setup.commit_on,
            "commit_veto": veto if setup.vetoes else None,
            "commit_error": say_sorry if setup.commit_error else None,
        }
        registries = list(self.registries.values())
        if setup.nested and len(registries) > 1:
            app = SessionMiddleware(app, registries.pop(), commit_on="close", commit_veto=None)
        self.app = SessionMiddleware(app, *registries, **options)

    def _registry(self, name: RegistryName) -> scoped_session[Session]:
        databases = self.databases

        class LaneSession(Session):
            def __init__(self, **options: Any) -> None:
                options["bind"] = databases.engine((current_scope().info["lane"], name))
                super().__init__(**options)

        factory: sessionmaker[Session] = sessionmaker(
            class_=LaneSession, twophase=name in self.setup.twophase
        )
        event.listen(factory, "before_commit", interrupt)
        return scoped_session(factory, scopefunc=current_scope)

    def sessions(self) -> int:
        return sum(len(each.registry.registry) for each in self.registries.values())

    def check_the_rule(self, environ: WSGIEnvironment) -> None:
        """No client gets a whole, successful response whose transaction did not commit."""
        lane: int = environ["tests.lane"]
        committed = self.databases.committed()
        for registry, labels in self.written[lane].items():
            rows = committed.get(self.databases.place((lane, registry)), [])
            if not set(labels) <= set(rows):
                self.violations.append(f"{environ['PATH_INFO']}: {labels}, yet only {rows}")

    # What the application asks for.

    def begin_request(self, environ: WSGIEnvironment) -> None:
        environ["tests.lane"] = self._begin(environ["wsgi_dbsession.scope"])

    def _begin(self, scope: Any) -> int:
        lane = scope.info["lane"] = self.lanes
        self.written[lane] = {}
        self.lanes += 1
        return lane

    def ask(self, environ: WSGIEnvironment) -> Exchange:
        self.asked.append(self.exchange(environ))
        return self.asked[-1]

    def exchange(self, environ: WSGIEnvironment) -> Exchange:
        return Exchange(self.app, environ, self.when_whole)

    def when_whole(self, environ: WSGIEnvironment, status: str) -> None:
        if (
            status.startswith("2")
            and self.setup.commit_on != "close"
            and environ["tests.lane"] not in self.doomed
        ):
            self.check_the_rule(environ)

    def say(self, what: Literal["doom", "keep"]) -> None:
        scope = current_scope()
        if what == "doom":
            self.doomed.add(scope.info["lane"])
            scope.doom()
        else:
            scope.keep()

    def hook(self, hook: Hook, label: str) -> None:
        scope = current_scope()

        def run() -> None:
            self.hooks_run.append(label)
            if hook.then == "raise":
                raise RuntimeError
            if hook.then == "add":
                self.registries["A"].add(Note(text=label))
            elif hook.then == "register another":
                register(functools.partial(self.hooks_run.append, f"{label}'"))

        register = scope.on_commit if hook.when == "commit" else scope.on_rollback
        register(run)

    @contextmanager
    def block(self) -> Iterator[None]:
        with session_scope(self.registries["A"]) as scope:
            self._begin(scope)
            yield

    def do(self, statement: Statement, registry: RegistryName, label: str) -> None:
        registry = self.setup.known(registry)
        session = self.registries[registry]
        written = self.written[current_scope().info["lane"]].setdefault(registry, [])
        note: Any = Note.__table__  # a table, whose statements do without the ORM
        match statement:
            case "add":
                session.add(Note(text=label))
            case "add orphan":
                session.add(Book(author_id=7))
            case "add invalid":
                session.add(Note(text=null()))
            case "insert":
                session.flush()  # as SQLAlchemy 2.1 does by itself
                session.execute(insert(note).values(text=label))
            case "fail":
                session.flush()
                session.execute(insert(note).values(text=null()))
            case "read":
                session.flush()
                session.execute(select(note.c.id))
            case "flush":
                session.flush()
            case "insert in savepoint":
                with session.begin_nested():
                    session.execute(insert(note).values(text=label))
            case "fail in savepoint":
                session.flush()
                with contextlib.suppress(IntegrityError), session.begin_nested():
                    session.execute(insert(note).values(text=null()))
            case "interrupt commit":
                session.info["interrupt"] = True
            case "commit":
                written.clear()
                try:
                    session.commit()
                except BaseException:
                    session.rollback()
                    raise
            case "rollback":
                session.rollback()
                written.clear()
            case "remove":
                session.remove()
                written.clear()
        if statement.startswith(("add", "insert")):
            written.append(label)


def interrupt(session: Session) -> None:
    """Be the timeout that hits a commit."""
    if not session.in_nested_transaction() and session.info.pop("interrupt", False):
        raise Interruption


class Log(logging.Handler):
    """Keeps what the package's log lines are about, for the side that is at it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        for words in (
            "the commit failed",
            "nobody knows if it took place",
            "because of its status",
            "a hook failed",
        ):
            if words in message:
                message = words
        self.lines.append(f"{record.levelname}: {message}")


# -- the machine ----------------------------------------------------------------------------------


SETUPS = st.builds(
    Setup,
    commit_on=st.sampled_from(("complete", "complete", "headers", "close")),
    commit_error=st.booleans(),
    vetoes=st.sampled_from((True, True, True, False)),
    registries=st.sampled_from((("A",), ("A", "B"), ("A", "B"))),
    nested=st.booleans(),
    twophase=st.sampled_from(((), ("A",), ("B",), ("A", "B"))),
)


class Requests(RuleBasedStateMachine):
    """Several requests, step by step, to the package and to its model."""

    databases: Files | Servers
    observed: Observed

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[Exchange, Exchange]] = []
        self.number = 0
        self.agreed = True

    @initialize(setup=SETUPS)
    def begin(self, setup: Setup) -> None:
        setup = self.databases.adapt(setup)
        self.world = World(setup, self.databases)
        self.model = Model(setup)

    @precondition(lambda self: len(self.open) < 3)
    @rule(plan=plans(), step=st.sampled_from(STEPS))
    def request(self, plan: Plan, step: Step) -> None:
        self.number += 1
        name = f"r{self.number}"
        self.open.append(
            (
                self.world.exchange(environ_for(plan, name)),
                self.model.exchange(environ_for(plan, name)),
            )
        )
        self.make_step(self.open[-1], step, Exchange.call)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2), step=st.sampled_from(STEPS))
    def go_on(self, which: int, step: Step) -> None:
        pair = self.open[which % len(self.open)]
        if pair[0].goes_on():
            self.make_step(pair, step, Exchange.next)
        else:
            self.open.remove(pair)
            self.make_step(pair, step, Exchange.close)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2), step=st.sampled_from(STEPS))
    def close(self, which: int, step: Step) -> None:
        self.make_step(self.open.pop(which % len(self.open)), step, Exchange.close)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2), step=st.sampled_from(STEPS))
    def forget(self, which: int, step: Step) -> None:
        self.make_step(self.open.pop(which % len(self.open)), step, Exchange.forget)

    def make_step(
        self,
        pair: tuple[Exchange, Exchange],
        step: Step,
        make: Callable[[Exchange], object],
    ) -> None:
        self.agreed = False
        real, expected = pair
        self.observed.by(self.world)
        run(step, functools.partial(make, real))
        self.observed.by(self.model)
        make(expected)
        assert real.view() == expected.view()
        self.check()
        self.agreed = True

    def check(self) -> None:
        world, model = self.world, self.model
        assert [each.view() for each in world.asked] == [each.view() for each in model.asked]
        assert world.violations == []
        expected: dict[Place, list[str]] = {}
        for place, rows in model.committed.items():
            expected.setdefault(self.databases.place(place), []).extend(rows)
        committed = self.databases.committed()
        for place in expected.keys() | committed.keys():
            assert sorted(committed.get(place, [])) == sorted(expected.get(place, [])), place
        assert world.hooks_run == model.hooks_run
        assert world.log == model.log
        assert world.lost == model.lost
        assert world.sessions() == model.sessions()
        assert self.databases.checked_out() == model.connections()
        assert self.databases.prepared() == []
        assert scope_in_context() is None

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            # Hypothesis stops some programs half-way, and a complaint from here confuses it then.
            if self.agreed and sys.exc_info()[0] is None:
                while self.open:
                    self.go_on(0, "here")
                assert self.world.sessions() == 0
                assert self.databases.checked_out() == 0
            else:
                for pair in self.open:
                    for exchange in pair:
                        exchange.close()
        finally:
            if self.agreed:
                self.databases.clear()
            else:
                self.databases.dispose()


def scope_in_context() -> object:
    for variable, value in contextvars.copy_context().items():
        if variable.name == "wsgi_dbsession.scope":
            return value
    return None


def run(step: Step, make: Callable[[], object]) -> None:
    """Make a step where the server would."""
    if step == "here":
        make()
    elif step == "in another context":
        contextvars.Context().run(make)
    else:
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()


class Observed:
    """What goes to the log and to ``sys.unraisablehook``, for the side that is at it."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lost: list[str] = []

    def by(self, side: World | Model) -> None:
        self._log.lines = side.log
        self._lost = side.lost

    def lose(self, unraisable: Any) -> None:
        self._lost.append(name_of(unraisable.exc_value))


@contextmanager
def observe() -> Iterator[Observed]:
    """Hear what is logged and what is lost; not by a fixture.

    pytest keeps the records of a logger that does not propagate when the test begins, and with
    their tracebacks whatever is to be forgotten.
    """
    log = Log()
    observed = Observed(log)
    logger = logging.getLogger("wsgi_dbsession")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", observed.lose)
        patch.setattr(logger, "propagate", False)
        patch.setattr(logger, "handlers", [log])
        logger.setLevel(logging.INFO)
        try:
            yield observed
        finally:
            logger.setLevel(logging.NOTSET)


def run_programs(given: Files | Servers, profile: settings) -> None:
    with observe() as listener:

        class Programs(Requests):
            databases = given
            observed = listener

        run_state_machine_as_test(Programs, settings=profile)


pytestmark = [
    # The application goes on with a Session whose flush failed.
    pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active"),
    # To make a program that fails a small one takes its time.
    pytest.mark.timeout(1000),
]


def test_random_programs_on_sqlite_do_what_the_model_says(tmp_path: Path) -> None:
    """Rows, answers, hooks, log lines, Sessions and connections are those of the model."""
    databases = Files(tmp_path)
    try:
        run_programs(databases, PROFILE)
    finally:
        databases.dispose()


def test_random_programs_on_postgresql_do_what_the_model_says(
    postgres_database: Database, other_postgres_database: Database
) -> None:
    """So they are where a failed statement spoils its transaction, and with two phases."""
    databases = Servers({"A": postgres_database, "B": other_postgres_database})
    try:
        run_programs(databases, settings(PROFILE, max_examples=PROFILE.max_examples // 5))
    finally:
        databases.close()
