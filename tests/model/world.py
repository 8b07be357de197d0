"""The databases of the random programs, and what is seen in them."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sqlite3
import weakref
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sqlalchemy import event, insert, null, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.model.programs import Application, Exchange, Hook, Interruption, RegistryName, Statement
from tests.model.unit import ORPHAN, Setup, say_sorry, veto
from tests.support.models import Base, Book, Database, Note, make_engine
from wsgi_dbsession import Scope, SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine

Step: TypeAlias = Literal["here", "in another context", "in another thread"]
STEPS: tuple[Step, ...] = (*("here", "in another context") * 4, "in another thread")

# The lane of a scope, which is its number in the program, and one of its registries.
Place: TypeAlias = "tuple[int, RegistryName]"

COMMITTED = f"SELECT text FROM note UNION ALL SELECT '{ORPHAN}' FROM book"
CLEAR = ("DELETE FROM note", "DELETE FROM book")
INERROR = 3  # of libpq
PREPARED = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"


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
        self.scopes: list[weakref.ref[Scope]] = []
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
        """Return how many Sessions the scopes have."""
        scopes = [reference() for reference in self.scopes]
        return sum(len(scope.sessions) for scope in scopes if scope is not None)

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
        self.scopes.append(weakref.ref(scope))
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
                if session.registry.has() and not is_healthy(session()):
                    written.clear()  # what was lost was lost before, and is only warned of
                session.remove()
        if statement.startswith(("add", "insert")):
            written.append(label)


def is_healthy(session: Session) -> bool:
    """Say whether no failed flush or statement has ended the transaction already."""
    if not session.in_transaction() or not session.is_active:
        return session.is_active
    driver: Any = session.connection().connection.dbapi_connection
    info = getattr(driver, "info", None)
    return info is None or info.transaction_status != INERROR


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
            "partly",
            "rolled back",
            "discarding uncommitted changes",
            "a hook failed",
            "closed a Session",
        ):
            if words in message:
                message = words
                break
        self.lines.append(f"{record.levelname}: {message}")
