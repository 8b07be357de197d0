"""What listeners of SQLAlchemy's events do, and what a Session class of the application does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, null, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.support.errors import AppError
from tests.support.models import Base, Database, Note
from tests.support.wsgi import ask, assert_nothing_left, drive
from wsgi_dbsession import Observer, Scope, SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("no silent loss")


# -- what is begun after the transaction ----------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "commit"),
    [
        ("adds", "the outcome"),
        ("adds", "Session.commit()"),
        ("changes", "the outcome"),  # SQLAlchemy expires it after the other
    ],
)
def test_a_listener_of_the_commit_uses_the_session(
    database: Database, registry: Registry, work: str, commit: str
) -> None:
    """The transaction is over then, and another one takes what is pending."""
    done: list[str] = []

    @event.listens_for(registry.session_factory, "after_commit")
    def on_commit(session: Session) -> None:
        if not done:
            done.append(work)
            if work == "adds":
                session.add(Note(text="late"))
            else:
                note.text = "late"

    with session_scope(registry):
        note = Note(text="a")
        registry.add(note)
        if commit == "Session.commit()":
            registry.commit()

    assert sorted(database.notes()) == (["a", "late"] if work == "adds" else ["late"])


def test_what_a_listener_of_the_commit_adds_is_not_discarded(sqlite_registry: Registry) -> None:
    """A close says so."""

    @event.listens_for(sqlite_registry.session_factory, "after_commit")
    def on_commit(session: Session) -> None:
        session.add(Note(text="late"))

    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(sqlite_registry),
    ):
        sqlite_registry.add(Note(text="a"))
        sqlite_registry.commit()
        sqlite_registry.remove()


# -- a listener of the flush ----------------------------------------------------------------------


@pytest.mark.promise("several registries")
@pytest.mark.parametrize("order", ["audit is last", "audit is first"])
@pytest.mark.parametrize("fails", [False, True], ids=["and succeeds", "and fails"])
def test_a_listener_of_the_flush_begins_another_session(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    order: str,
    fails: bool,
) -> None:
    """All are flushed before the first is committed, so that a failure leaves nothing."""
    main, audit = two

    @event.listens_for(main.session_factory, "after_flush")
    def on_flush(session: Session, context: object) -> None:
        audit.add(Note(text=null() if fails else "audit"))

    registries = (main, audit) if order == "audit is last" else (audit, main)
    done: list[str] = []

    def work() -> None:
        with session_scope(*registries) as scope:
            if order == "audit is first":
                audit()  # is asked for, and has begun nothing
            main.add(Note(text="main"))
            scope.on_commit(done.append, "commit")

    if fails:
        with pytest.raises(IntegrityError):
            work()
    else:
        work()

    assert postgres_database.notes() == ([] if fails else ["main"])
    assert other_postgres_database.notes() == ([] if fails else ["audit"])
    assert done == ([] if fails else ["commit"])


# -- classes of the application -------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Any]:
    """An engine of its own over SQLite."""
    found = create_engine(f"sqlite:///{tmp_path}/own.db")
    Base.metadata.create_all(found)
    yield found
    found.dispose()


@pytest.mark.promise("no false success")
def test_a_commit_that_returns_without_a_commit_is_an_error(engine: Any) -> None:
    """Whatever the class of the application does, the client gets no success."""

    class Careless(Session):
        def commit(self) -> None:
            try:
                raise AppError
            except AppError:
                self.rollback()

    registry: Any = scoped_session(sessionmaker(engine, class_=Careless), scopefunc=current_scope)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        registry.add(Note(text="lost"))
        start_response("201 Created", [])
        return [b"done"]

    reply = ask(SessionMiddleware(app, registry), "POST")

    assert reply.status.startswith("500")
    assert [str(each) for each in reply.errors] == [
        "Careless.commit() has returned, but has not committed"
    ]
    assert_nothing_left(registry)


def test_a_close_takes_the_arguments_of_its_class(engine: Any) -> None:
    """The package's own is in front of it."""
    given: list[object] = []

    class Forcing(Session):
        def close(self, force: bool = False) -> None:
            given.append(force)
            super().close()

        def reset(self, force: bool = False) -> None:
            given.append(force)

        def invalidate(self, force: bool = False) -> None:
            given.append(force)

    registry: Any = scoped_session(sessionmaker(engine, class_=Forcing), scopefunc=current_scope)
    with session_scope(registry):
        registry().close(force=True)
        registry().reset(True)
        registry().invalidate(force=True)

    assert given == [True, True, True, False]


def test_a_transaction_that_a_statement_begins_on_sqlite(engine: Any, tmp_path: Path) -> None:
    """With ``isolation_level=None`` and no listener, it is not AUTOCOMMIT any more."""
    own = create_engine(engine.url, connect_args={"isolation_level": None})
    registry = scoped_session(sessionmaker(own), scopefunc=current_scope)

    def write() -> None:
        registry.execute(text("BEGIN IMMEDIATE"))
        registry.execute(text("INSERT INTO note (text) VALUES ('a')"))

    with session_scope(registry):
        write()
    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(registry),
    ):
        write()
        registry.remove()

    with session_scope(registry):
        assert registry.scalars(select(Note.text)).all() == ["a"]
    own.dispose()


def test_the_recipe_of_sqlalchemy_begins_a_transaction_at_autocommit(
    sqlite_registry: Registry,
) -> None:
    """SQLAlchemy calls its listener at each isolation level."""
    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(sqlite_registry),
    ):
        sqlite_registry.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        sqlite_registry.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        sqlite_registry.remove()


# -- an observer ----------------------------------------------------------------------------------


def test_an_observer_of_the_end_gets_no_session(
    sqlite_registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing would commit or close it."""

    class Late(Observer):
        def closed(self, scope: Scope) -> None:
            sqlite_registry.add(Note(text="late"))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", [])
        return [b"done"]

    drive(SessionMiddleware(app, sqlite_registry, observers=[Late()]))

    (record,) = caplog.records
    assert record.getMessage().startswith("observer failed in closed()")
    assert "no active scope" in str(record.exc_info)
    assert_nothing_left(sqlite_registry)
