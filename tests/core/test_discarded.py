"""Work that the application discards without saying so does not end in a success."""

from __future__ import annotations

import logging
import signal
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.pool import StaticPool

from tests.core.discards import (
    DISCARDS,
    HARMLESS,
    WRITES,
    flush,
    insert_by_text,
    read,
)
from tests.support.errors import AppError
from tests.support.models import Base, Database, Note, make_engine, without_autocommit
from tests.support.wsgi import ask, make_registry
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine

    from tests.support.postgres import Admin

    Registry = scoped_session[Session]
    Work = Callable[[Registry], None]

pytestmark = pytest.mark.promise("no silent loss", "discarded")

HERE = "tests/core/discards.py:"


def application(*works: Callable[[], object], status: str = "201 Created") -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        for work in works:
            work()
        start_response(status, [])
        return [b"done"]

    return app


@pytest.mark.parametrize("discard", DISCARDS.values(), ids=DISCARDS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_discarded_write_is_refused(
    stocked: tuple[Registry, Database], write: Work, discard: Work
) -> None:
    """The client gets an error that names the line; no hook runs that waits for the commit."""
    registry, database = stocked
    hooks: list[str] = []

    def register() -> None:
        current_scope().on_commit(hooks.append, "commit")
        current_scope().on_rollback(hooks.append, "rollback")

    app = application(register, lambda: write(registry), lambda: discard(registry))

    reply = ask(SessionMiddleware(app, registry), "POST")

    assert reply.status.startswith("500")
    (error,) = reply.errors
    assert "what it had written is lost" in str(error)
    assert HERE in str(error)
    assert hooks == ["rollback"]
    assert database.notes() == ["there"]


@pytest.mark.parametrize("discard", DISCARDS.values(), ids=DISCARDS)
@pytest.mark.parametrize("work", HARMLESS.values(), ids=HARMLESS)
def test_a_correct_program_is_not_refused(
    stocked: tuple[Registry, Database],
    work: Work,
    discard: Work,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A Session that only read, or that was committed or rolled back, may be closed."""
    registry, database = stocked
    app = application(lambda: work(registry), lambda: discard(registry))

    reply = ask(SessionMiddleware(app, registry), "POST")

    assert (reply.status, reply.errors) == ("201 Created", [])
    assert caplog.records == []
    assert database.notes() == ["there"]


def test_what_was_written_in_a_savepoint_counts(registry: Registry, database: Database) -> None:
    """Releasing it commits nothing."""
    with pytest.raises(RuntimeError, match="what it had written is lost"), session_scope(registry):
        with registry.begin_nested():
            insert_by_text(registry)
        registry.remove()

    assert database.notes() == []


def test_what_was_written_after_a_commit_counts(stocked: tuple[Registry, Database]) -> None:
    """A commit takes back no later write."""
    registry, database = stocked

    with (
        pytest.raises(RuntimeError, match="cannot commit: a Session was closed at "),
        session_scope(registry),
    ):
        registry.add(Note(text="kept"))
        registry.commit()
        insert_by_text(registry)
        registry.remove()

    assert database.notes() == ["kept", "there"]


def test_later_work_does_not_hide_it(stocked: tuple[Registry, Database]) -> None:
    """A new Session in the same request is not committed alone."""
    registry, database = stocked

    with pytest.raises(RuntimeError, match="what it had written is lost"), session_scope(registry):
        insert_by_text(registry)
        registry.remove()
        registry.add(Note(text="half"))

    assert database.notes() == ["there"]


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops"])
def test_an_error_page_stays_what_it_is(
    sqlite_registry: Registry, sqlite_database: Database, status: str
) -> None:
    """The client knows already."""
    app = application(
        lambda: insert_by_text(sqlite_registry), sqlite_registry.remove, status=status
    )

    reply = ask(SessionMiddleware(app, sqlite_registry), "POST")

    assert (reply.status, reply.errors) == (status, [])
    assert sqlite_database.notes() == []


def test_doom_says_it_in_so_many_words(sqlite_registry: Registry) -> None:
    """The application has asked for the rollback."""
    with session_scope(sqlite_registry) as scope:
        insert_by_text(sqlite_registry)
        scope.doom()
        sqlite_registry.remove()

    assert (scope.outcome, scope.reason) == ("rollback", "doomed")


def test_reset_counts(sqlite_registry: Registry) -> None:
    """``Session.reset()`` closes the Session too, from SQLAlchemy 2.0.22 on."""
    if not hasattr(Session, "reset"):
        pytest.skip("SQLAlchemy 2.0.20 and 2.0.21 have no Session.reset()")

    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(sqlite_registry),
    ):
        insert_by_text(sqlite_registry)
        sqlite_registry.reset()


def test_a_thread_may_close_the_session_that_it_was_given(
    postgres_registry: Registry, postgres_database: Database
) -> None:
    """The Session knows its scope, in whatever thread it is closed."""

    def work(session: Session) -> None:
        session.add(Note(text="lost"))
        session.close()

    with (
        pytest.raises(RuntimeError, match=r"test_discarded.py:\d+ in work"),
        session_scope(postgres_registry),
    ):
        thread = threading.Thread(target=work, args=[postgres_registry()])
        thread.start()
        thread.join()

    assert postgres_database.notes() == []


def test_the_first_discard_is_named(sqlite_registry: Registry) -> None:
    """It is the one with which the loss began."""
    with (
        pytest.raises(RuntimeError, match=r"discards\.py:\d+ in remove"),
        session_scope(sqlite_registry),
    ):
        insert_by_text(sqlite_registry)
        DISCARDS["Session.remove()"](sqlite_registry)
        insert_by_text(sqlite_registry)
        DISCARDS["Session.close()"](sqlite_registry)


def test_each_outcome_covers_its_own_discards(
    sqlite_registry: Registry, sqlite_database: Database
) -> None:
    """What a stream writes and discards after the headers fails there, and only that."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        sqlite_registry.add(Note(text="kept"))
        start_response("200 OK", [])
        yield b"one"
        insert_by_text(sqlite_registry)
        sqlite_registry.remove()

    reply = ask(SessionMiddleware(app, sqlite_registry, commit_on="headers"))

    assert not reply.whole
    assert [type(error) for error in reply.errors] == [RuntimeError]
    assert sqlite_database.notes() == ["kept"]


def test_the_teardown_of_every_tutorial_is_refused(
    sqlite_registry: Registry, sqlite_database: Database
) -> None:
    """Flask calls it before the middleware gets the response."""
    app = Flask(__name__)
    app.wsgi_app = SessionMiddleware(app.wsgi_app, sqlite_registry)  # type: ignore[method-assign]

    @app.post("/")
    def post() -> tuple[str, int]:
        sqlite_registry.add(Note(text="lost"))
        return "", 201

    @app.get("/")
    def get() -> str:
        return str(sqlite_registry.scalar(text("SELECT count(*) FROM note")))

    @app.teardown_appcontext
    def remove(*_: object) -> None:
        sqlite_registry.remove()

    with pytest.raises(RuntimeError, match=r"test_discarded.py:\d+ in remove"):
        app.test_client().post("/")
    assert app.test_client().get("/").text == "0"
    assert sqlite_database.notes() == []


def test_the_session_of_flask_sqlalchemy_is_refused_where_it_wrote(tmp_path: Any) -> None:
    """Its own teardown removes ``db.session``; the error names the line in that package."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'app.db'}"
    db = SQLAlchemy(session_options={"scopefunc": current_scope})
    session: Any = db.session
    app.wsgi_app = SessionMiddleware(app.wsgi_app, session)  # type: ignore[method-assign]
    db.init_app(app)
    with app.app_context():
        Base.metadata.create_all(db.engine)
        engine = db.engine

    @app.post("/")
    def post() -> tuple[str, int]:
        session.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        return "", 201

    @app.get("/")
    def get() -> str:
        return str(session.scalar(text("SELECT count(*) FROM note")))

    with pytest.raises(RuntimeError, match=r"flask_sqlalchemy\W.*_teardown_session"):
        app.test_client().post("/")
    assert app.test_client().get("/").text == "0"
    engine.dispose()


# -- where it cannot be known ---------------------------------------------------------------------


def spoil(registry: Registry, statement: str) -> None:
    insert_by_text(registry)
    with pytest.raises(DBAPIError):
        registry.execute(text(statement))


def test_what_cannot_be_known_is_warned_of_once(
    postgres_registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL answers no question in an aborted transaction: one line for each place."""
    for _ in range(2):
        with session_scope(postgres_registry, name="nightly"):
            spoil(postgres_registry, "SELECT 1/0")
            postgres_registry.remove()

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("nightly: closed a Session in an open transaction at ")
    assert "test_discarded.py" in record.getMessage()


def test_a_row_that_was_only_locked_is_not_called_lost(
    driver_registry: Registry, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL gives a lock a transaction ID, as it does a write, so a warning has to do."""
    with postgres_database.observer.begin() as connection:
        connection.execute(Note.__table__.insert().values(text="there"))  # type: ignore[attr-defined]
    lock = select(Note.text).with_for_update(key_share=True)

    with session_scope(driver_registry) as scope:
        assert driver_registry.scalars(lock).all() == ["there"]
        driver_registry.remove()
    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(driver_registry),
    ):
        driver_registry.execute(lock)
        driver_registry.execute(text("UPDATE note SET text = 'lost'"))
        driver_registry.remove()

    assert scope.outcome == "commit"
    assert "closed a Session in an open transaction" in caplog.text
    assert postgres_database.notes() == ["there"]


@pytest.mark.parametrize(
    "statement",
    [
        "TRUNCATE note",
        "CREATE TABLE other (x INT)",
        "GRANT SELECT ON note TO PUBLIC",
        "COMMENT ON TABLE note IS 'lost'",
        "CREATE FUNCTION f() RETURNS INT LANGUAGE sql AS 'SELECT 1'",
        "SELECT lo_create(0)",
        "COPY note (text) FROM PROGRAM 'echo lost'",
    ],
)
def test_whatever_postgresql_writes_is_known(statement: str, postgres_registry: Registry) -> None:
    """Not only rows of tables."""
    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(postgres_registry),
    ):
        postgres_registry.execute(text(statement))
        postgres_registry.remove()


def test_a_failed_flush_leaves_it_unknown(
    sqlite_registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLAlchemy has rolled back by then, and with it what Core had written."""
    with session_scope(sqlite_registry):
        insert_by_text(sqlite_registry)
        sqlite_registry.add(Note(id=1, text="twice"))
        with pytest.raises(IntegrityError):
            sqlite_registry.flush()
        sqlite_registry.remove()

    assert "closed a Session in an open transaction" in caplog.text


def test_what_was_flushed_is_known_to_be_lost(postgres_registry: Registry) -> None:
    """Even where the database cannot be asked any more."""
    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(postgres_registry),
    ):
        postgres_registry.add(Note(text="lost"))
        postgres_registry.flush()
        with pytest.raises(DBAPIError):
            postgres_registry.execute(text("SELECT 1/0"))
        postgres_registry.remove()


def test_a_connection_that_was_lost_unnoticed_is_refused(
    driver_registry: Registry, postgres_database: Database, postgres_admin: Admin
) -> None:
    """The database cannot say whether something was written, but COMMIT would have failed."""
    with (
        pytest.raises(RuntimeError, match="cannot commit: a Session was closed at"),
        session_scope(driver_registry),
    ):
        insert_by_text(driver_registry)
        postgres_admin.terminate()
        with pytest.raises(DBAPIError):  # out of its ROLLBACK
            driver_registry.remove()

    assert postgres_database.notes() == []


@pytest.mark.parametrize("driver", ["psycopg", "pg8000"])
def test_a_time_out_while_the_database_is_asked_is_not_swallowed(
    postgres_database: Database, monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    """That of gevent reaches the application, and no later statement reads the late answer.

    The bank's soak test found a success that had saved nothing.
    """

    def time_out(*_: object) -> None:
        raise AppError

    engine = make_engine(
        postgres_database.url.set(drivername=f"postgresql+{driver}"), pool_size=1, max_overflow=0
    )
    registry = make_registry(engine)
    monkeypatch.setattr(
        "wsgi_dbsession._driver._POSTGRESQL", "SELECT true, true, false FROM pg_sleep(1)"
    )
    before = signal.signal(signal.SIGALRM, time_out)
    try:
        with pytest.raises(AppError), session_scope(registry) as scope:
            insert_by_text(registry)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            registry.remove()
    finally:
        signal.signal(signal.SIGALRM, before)
    with session_scope(registry):
        assert registry.scalar(text("SELECT 7")) == 7
    engine.dispose()

    assert (scope.outcome, scope.reason) == ("rollback", "error")
    assert postgres_database.notes() == []


def test_a_lost_connection_leaves_it_unknown(
    postgres_registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """The database has rolled back; the application has had the error."""
    with session_scope(postgres_registry):
        insert_by_text(postgres_registry)
        postgres_registry.connection().invalidate()
        postgres_registry.remove()

    assert "closed a Session in an open transaction" in caplog.text


class Foreign:
    """A driver's connection of a database that is not known."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        if name in ("total_changes", "in_transaction"):
            raise AttributeError(name)
        return getattr(self._connection, name)


def test_an_unknown_database_leaves_it_unknown(caplog: pytest.LogCaptureFixture) -> None:
    """No question is sent to a server that might not understand it."""
    engine = create_engine(
        "sqlite://",
        poolclass=StaticPool,
        creator=lambda: Foreign(sqlite3.connect(":memory:")),
        _initialize=False,
    )
    engine.dialect.__class__ = type(
        "OtherDialect", (type(engine.dialect),), {"supports_statement_cache": True}
    )
    registry = make_registry(engine)

    with session_scope(registry):
        registry.execute(text("SELECT 1"))
        registry.remove()

    assert "closed a Session in an open transaction" in caplog.text
    engine.dispose()


def close_connection(registry: Registry) -> None:
    registry.connection().close()


def commit_and_go_on(registry: Registry) -> None:
    registry.connection().commit()
    insert_by_text(registry)


def give_connection_back(registry: Registry) -> None:
    registry.connection().connection.close()


@pytest.mark.parametrize("close", [close_connection, give_connection_back])
@pytest.mark.parametrize("work", [insert_by_text, read])
def test_after_its_connection_was_closed_it_is_unknown(
    stocked: tuple[Registry, Database],
    caplog: pytest.LogCaptureFixture,
    work: Work,
    close: Work,
) -> None:
    """Whoever closes the Session's own connection, as one of an engine, rolls back in silence."""
    registry, _ = stocked

    with session_scope(registry):
        work(registry)
        close(registry)
        registry.remove()

    assert "closed a Session in an open transaction" in caplog.text


@pytest.mark.parametrize("close", [close_connection, give_connection_back])
def test_what_was_flushed_before_its_connection_was_closed_is_lost(
    stocked: tuple[Registry, Database], close: Work
) -> None:
    """The Session knows of it."""
    registry, database = stocked

    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(registry),
    ):
        flush(registry)
        close(registry)
        registry.remove()

    assert database.notes() == ["there"]


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        pytest.param(close_connection, 0, id="closed"),
        pytest.param(give_connection_back, 0, id="given back"),
        pytest.param(lambda registry: registry.connection().rollback(), 0, id="rolled back"),
        pytest.param(lambda registry: registry.connection().commit(), 1, id="committed"),
        pytest.param(commit_and_go_on, 1, id="committed, and used again"),
    ],
)
# SQLAlchemy warns of the connection that was closed in its transaction.
@pytest.mark.filterwarnings("ignore:transaction already deassociated:sqlalchemy.exc.SAWarning")
def test_a_connection_whose_transaction_was_ended_cannot_commit(
    stocked: tuple[Registry, Database], end: Work, kept: int
) -> None:
    """The Session still believes in that transaction."""
    registry, database = stocked

    with (
        pytest.raises(InvalidRequestError, match=r"Call Session\.commit\(\) or Session\.rollback"),
        session_scope(registry) as s,
    ):
        insert_by_text(registry)
        end(registry)

    assert (s.outcome, s.reason) == ("rollback", "rolled back")
    assert len(database.notes()) == 1 + kept


@pytest.mark.parametrize("write", [insert_by_text, flush])
def test_autocommit_has_nothing_to_lose(
    postgres_database: Database, caplog: pytest.LogCaptureFixture, write: Work
) -> None:
    """Each statement is committed by itself."""
    engine = make_engine(postgres_database.url, isolation_level="AUTOCOMMIT")
    registry = make_registry(engine)

    with session_scope(registry):
        write(registry)
        registry.remove()

    assert postgres_database.notes() == ["lost"]
    assert caplog.records == []
    engine.dispose()


@pytest.mark.parametrize("create", [create_engine, without_autocommit])
def test_a_shared_connection_keeps_the_account_of_who_began_first(
    create: Callable[..., Engine],
) -> None:
    """A StaticPool gives one connection to two Sessions: the later one hides no write."""
    engine = create("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    registry, other = make_registry(engine), make_registry(engine)

    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(registry, other),
    ):
        insert_by_text(registry)
        other.scalar(text("SELECT 1"))
        registry.remove()
    engine.dispose()


def test_what_was_committed_on_the_connection_itself_is_not_lost(
    registry: Registry, database: Database
) -> None:
    """Behind the Session's back, which still believes in its transaction."""
    with session_scope(registry) as scope:
        insert_by_text(registry)
        registry.connection().commit()
        registry.remove()

    assert scope.outcome == "commit"
    assert len(database.notes()) == 1
