"""A request that lost a race runs again, if nothing of it was committed, and nobody notices."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import sqlite3
import subprocess
import sys
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import bottle
import falcon
import flask
import pytest
from pyramid.config import Configurator
from pyramid.request import Request as PyramidRequest
from pyramid.response import Response as PyramidResponse
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError

from tests.models import Author, Book, Database, Note, make_engine
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.retry import Retry, RetryMiddleware, run_transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine

    from tests.postgres import Server


def registry_of(engine: Engine, **options: Any) -> scoped_session[Session]:
    return scoped_session(sessionmaker(engine, **options), scopefunc=current_scope)


@pytest.fixture
def serializable(postgres_database: Database) -> Iterator[scoped_session[Session]]:
    """A registry over PostgreSQL at SERIALIZABLE, with one committed note."""
    engine = make_engine(postgres_database.url, isolation_level="SERIALIZABLE")
    registry = registry_of(engine)
    with session_scope(registry):
        registry.add(Note(text="first"))
    yield registry
    pool: Any = engine.pool
    left = pool.checkedout()
    engine.dispose()
    assert left == 0, f"{left} connections were not returned to the pool"
    assert registry.registry.registry == {}


@pytest.fixture
def plain() -> Iterator[scoped_session[Session]]:
    """A registry for what has nothing to do with the database."""
    engine = create_engine("sqlite://")
    yield registry_of(engine)
    engine.dispose()


@pytest.fixture
def notes(sqlite_database: Database) -> scoped_session[Session]:
    """A registry over SQLite, with no note."""
    return registry_of(sqlite_database.engine)


@dataclass
class Race:
    """Work that somebody else gets in the way of, in the first attempts."""

    registry: scoped_session[Session]
    server: Server
    #: the statement, or the COMMIT, that tells
    at: str = "statement"
    #: in how many attempts
    lost: int = 1
    attempts: int = 0

    def run(self) -> None:
        """Add a note that says how many there are, and count the attempt."""
        self.attempts += 1
        if self.at == "statement":
            note = self.registry.scalars(select(Note).order_by(Note.id)).first()
            assert note is not None
            if self.attempts <= self.lost:
                self.interfere("UPDATE note SET text = text || '!' WHERE id = 1")
            note.text += "?"
            self.registry.flush()
        else:
            count = self.registry.scalar(select(func.count()).select_from(Note))
            self.registry.add(Note(text=f"number {count}"))
            self.registry.flush()
            if self.attempts <= self.lost:
                self.interfere("INSERT INTO note (text) SELECT 'theirs ' || count(*) FROM note")

    def interfere(self, statement: Any) -> None:
        # Not by an engine: its commit would be one of this request.
        engine: Any = self.registry.get_bind()
        database: str = engine.url.database
        with self.server.connect(database) as connection:
            connection.execute("SET default_transaction_isolation = serializable")
            connection.execute(statement)

    def done(self) -> list[str]:
        """Return the notes as they must be after one success."""
        if self.at == "statement":
            return ["first" + "!" * self.lost + "?"]
        theirs = [f"theirs {number}" for number in range(1, self.lost + 1)]
        return sorted(["first", *theirs, f"number {self.lost + 1}"])


@pytest.fixture(params=["statement", "commit"])
def race(
    request: pytest.FixtureRequest, serializable: scoped_session[Session], postgres_server: Server
) -> Race:
    """A race that is lost once, at a statement or at the COMMIT."""
    return Race(serializable, postgres_server, request.param)


@pytest.fixture
def statement_race(serializable: scoped_session[Session], postgres_server: Server) -> Race:
    """A race that is lost once, at a statement."""
    return Race(serializable, postgres_server)


# -- a server of which every step is seen -------------------------------------------------------


@dataclass
class Reply:
    status: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    blocks: list[bytes] = field(default_factory=list)
    starts: int = 0

    @property
    def body(self) -> bytes:
        return b"".join(self.blocks)

    def start(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        assert exc_info is not None or not self.starts, "start_response was called twice"
        if exc_info is not None and self.body:
            raise exc_info[1]
        self.starts += 1
        self.status, self.headers = status, headers
        return self.blocks.append


def make_environ(method: str = "GET", body: bytes = b"", **more: Any) -> WSGIEnvironment:
    environ: WSGIEnvironment = {
        "REQUEST_METHOD": method,
        "PATH_INFO": "/path",
        "SCRIPT_NAME": "",
        "QUERY_STRING": "",
        "wsgi.input": io.BytesIO(body),
        "wsgi.file_wrapper": FileWrapper,
    }
    if body:
        environ["CONTENT_LENGTH"] = str(len(body))
    environ.update(more)
    setup_testing_defaults(environ)
    return environ


def ask(app: WSGIApplication, method: str = "GET", body: bytes = b"", **more: Any) -> Reply:
    """Make all steps of a request."""
    reply = Reply()
    result = app(make_environ(method, body, **more), reply.start)
    try:
        for block in result:
            assert reply.starts, "a block was sent before start_response was called"
            reply.blocks.append(block)
    finally:
        getattr(result, "close", lambda: None)()
    return reply


def protect(app: WSGIApplication, *registries: scoped_session[Session], **more: Any) -> Any:
    """Put both middlewares around an application, with no delay."""
    return RetryMiddleware(SessionMiddleware(app, *registries), **{"backoff": 0, **more})


class Closing:
    """A response with a ``close()`` that counts."""

    closed = 0

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.blocks = blocks

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.blocks)

    def close(self) -> None:
        Closing.closed += 1


@pytest.fixture(autouse=True)
def _no_closed_responses() -> None:
    Closing.closed = 0


TEXT = [("Content-Type", "text/plain")]
SIZED = [*TEXT, ("Content-Length", "4")]


def list_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response("200 OK", SIZED)
        return [b"done"]

    return app


def early_start_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        work()
        return (b"done",)

    return app


def file_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response("200 OK", SIZED)
        wrap: Callable[[io.BytesIO], Iterable[bytes]] = environ["wsgi.file_wrapper"]
        return wrap(io.BytesIO(b"done"))

    return app


def generator_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        work()
        start_response("200 OK", SIZED)
        yield b"done"

    return app


def closing_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response("200 OK", SIZED)
        return Closing([b"done"])

    return app


def lazy_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def blocks() -> Iterator[bytes]:
            work()
            yield b"done"

        start_response("200 OK", SIZED)
        return Closing(blocks())

    return app


SHAPES = {
    "list": list_app,
    "start before the work": early_start_app,
    "file wrapper": file_app,
    "generator application": generator_app,
    "iterable with close()": closing_app,
    "work in the first next()": lazy_app,
}


# -- what is run again --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_lost_race_is_run_again_and_nobody_notices(
    shape: str, race: Race, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets one whole success, its work is committed once, and no error is logged."""
    caplog.set_level(logging.INFO)
    app = protect(SHAPES[shape](race.run), race.registry)

    reply = ask(app, "POST")

    assert (reply.status, reply.body, reply.starts) == ("200 OK", b"done", 1)
    assert race.attempts == 2
    assert sorted(postgres_database.notes()) == race.done()
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        "POST /path: attempt 1 of 3 failed with SerializationFailure (40001); "
        "the next one begins in 0.000 s"
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_response_start_and_hooks_survive_the_validator(shape: str, race: Race) -> None:
    """The reference validator is silent on both sides of the middleware."""
    app = validator(protect(validator(SHAPES[shape](race.run)), race.registry))
    environ = make_environ()
    del environ["wsgi.file_wrapper"]  # the inner validator hides that it returned one
    if shape == "file wrapper":
        environ["wsgi.file_wrapper"] = FileWrapper
    environ["SCRIPT_NAME"] = ""
    reply = Reply()

    result = app(environ, reply.start)
    body = b"".join(result)
    result.close()  # type: ignore[attr-defined]

    assert (reply.status, body, race.attempts) == ("200 OK", b"done", 2)


@pytest.mark.parametrize("shape", ["iterable with close()", "work in the first next()"])
def test_the_response_of_each_attempt_is_closed_once(shape: str, race: Race) -> None:
    """The iterable of a failed attempt is closed, that of the last one when the server does."""
    in_call = shape == "iterable with close()" and race.at == "statement"

    ask(protect(SHAPES[shape](race.run), race.registry), "POST")

    # An attempt that failed in the call has returned no iterable.
    assert Closing.closed == (1 if in_call else 2)


@pytest.mark.parametrize("losses", [2, 3])
def test_attempts_are_counted_and_run_out(
    losses: int, race: Race, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Each attempt knows its number and the last one; after that the error goes to the server."""
    caplog.set_level(logging.INFO)
    race.lost = losses
    seen: list[tuple[int, int]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append((environ["wsgi_dbsession.attempt"], environ["wsgi_dbsession.attempts"]))
        race.run()
        start_response("200 OK", TEXT)
        return [b"done"]

    if losses == 2:
        assert ask(protect(app, race.registry), "POST").body == b"done"
        assert sorted(postgres_database.notes()) == race.done()
    else:
        with pytest.raises(OperationalError):
            ask(protect(app, race.registry), "POST")
        warning = next(record for record in caplog.records if record.levelname == "WARNING")
        assert warning.getMessage() == (
            "POST /path: attempt 3 of 3 failed with SerializationFailure (40001); "
            "it was the last one"
        )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len([record for record in caplog.records if record.levelname == "INFO"]) == 2
    # The core's own line on a failed commit comes for the attempt that stays.
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == (1 if losses == 3 and race.at == "commit" else 0)


def test_one_attempt_is_no_retry(race: Race) -> None:
    """With attempts=1 the error of the first goes to the server."""
    with pytest.raises(OperationalError):
        ask(protect(list_app(race.run), race.registry, attempts=1), "POST")

    assert race.attempts == 1


def flask_app(work: Callable[[], object]) -> WSGIApplication:
    app = flask.Flask("retry")

    @app.post("/path")
    def view() -> str:
        work()
        return "done"

    return app


def bottle_app(work: Callable[[], object]) -> WSGIApplication:
    app = bottle.Bottle()

    def view() -> str:
        work()
        return "done"

    app.route("/path", "POST", view)
    wsgi: WSGIApplication = app
    return wsgi


def falcon_app(work: Callable[[], object]) -> WSGIApplication:
    class Resource:
        def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
            work()
            response.text = "done"

    app: Any = falcon.App()
    app.add_route("/path", Resource())
    wsgi: WSGIApplication = app
    return wsgi


def pyramid_app(work: Callable[[], object]) -> WSGIApplication:
    def view(request: Any) -> Any:
        work()
        return PyramidResponse("done")

    def error(failure: Any, request: Any) -> Any:
        return PyramidResponse("sorry", status=500)

    with Configurator() as config:
        config.add_route("path", "/path")
        config.add_view(view, route_name="path")
        config.add_exception_view(error)
        wsgi: WSGIApplication = config.make_wsgi_app()
    return wsgi


def bare_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            work()
        except Exception:
            start_response("500 Internal Server Error", TEXT, sys.exc_info())
            return [b"sorry"]
        start_response("200 OK", TEXT)
        return [b"done"]

    return app


FRAMEWORKS = {
    "Flask": flask_app,
    "Bottle": bottle_app,
    "Falcon": falcon_app,
    "Pyramid": pyramid_app,
    "bare": bare_app,
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_race_that_became_an_error_page_is_run_again(
    framework: str, race: Race, postgres_database: Database
) -> None:
    """It does not matter that the framework turned the exception into a response."""
    app = FRAMEWORKS[framework](race.run)

    reply = ask(protect(app, race.registry), "POST", b"a=b")

    assert (reply.status, reply.body, race.attempts) == ("200 OK", b"done", 2)
    assert sorted(postgres_database.notes()) == race.done()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_error_page_made_of_anything_else_is_not_run_again(
    framework: str, serializable: scoped_session[Session]
) -> None:
    """Neither another exception nor another error of the database is worth a second try."""
    attempts: list[str] = []

    def fail() -> None:
        attempts.append("an exception")
        serializable.add(Note(text="lost"))
        raise ValueError

    def violate() -> None:
        attempts.append("a database error")
        serializable.add(Note(id=1))
        serializable.flush()

    for work in (fail, violate):
        reply = ask(protect(FRAMEWORKS[framework](work), serializable), "POST", b"a=b")
        assert reply.status[:3] == "500"
    assert attempts == ["an exception", "a database error"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_last_error_page_is_handed_on(framework: str, race: Race) -> None:
    """When attempts run out, the client gets what the application made of the last failure."""
    race.lost = 9
    app = SessionMiddleware(FRAMEWORKS[framework](race.run), race.registry)
    if race.at == "commit":
        with pytest.raises(OperationalError):
            ask(RetryMiddleware(app, backoff=0), "POST", b"a=b")
    else:
        reply = ask(RetryMiddleware(app, backoff=0), "POST", b"a=b")
        assert reply.status[:3] == "500"
    assert race.attempts == 3


def test_a_lost_race_that_was_called_a_success_is_run_again(
    statement_race: Race, postgres_database: Database
) -> None:
    """An application that swallowed the error cannot commit, and that is why it runs again."""

    def work() -> None:
        with contextlib.suppress(OperationalError):
            statement_race.run()

    assert ask(protect(list_app(work), statement_race.registry), "POST").body == b"done"
    assert postgres_database.notes() == statement_race.done()


@pytest.mark.parametrize("shape", [list_app, flask_app], ids=["raised", "error page"])
@pytest.mark.parametrize("by", ["flush", "statement"])
def test_an_error_that_only_follows_from_the_first_does_not_hide_it(
    by: str, shape: Callable[[Callable[[], object]], WSGIApplication], statement_race: Race
) -> None:
    """What SQLAlchemy or PostgreSQL says to the statement after it is no new cause."""
    session = statement_race.registry

    def run_without_flush() -> None:
        statement_race.attempts += 1
        session.scalars(select(Note)).one()
        if statement_race.attempts == 1:
            statement_race.interfere("UPDATE note SET text = 'theirs'")
        session.execute(text("UPDATE note SET text = 'mine'"))

    def work() -> None:
        with contextlib.suppress(OperationalError):
            (statement_race.run if by == "flush" else run_without_flush)()
        # PendingRollbackError after a failed flush, "current transaction is aborted" otherwise.
        session.execute(text("SELECT 1"))

    assert ask(protect(shape(work), session), "POST").body == b"done"
    assert statement_race.attempts == 2


def test_a_later_error_of_the_database_is_the_cause(statement_race: Race) -> None:
    """A race that the application dealt with does not excuse another failure."""

    def work() -> None:
        with contextlib.suppress(OperationalError):
            statement_race.run()
        statement_race.registry.rollback()
        statement_race.registry.execute(text("INSERT INTO note VALUES (1, 'again')"))

    reply = ask(protect(flask_app(work), statement_race.registry), "POST")

    assert reply.status[:3] == "500"
    assert statement_race.attempts == 1


def test_what_an_error_was_caused_by_counts(statement_race: Race) -> None:
    """An application's own exception, raised from a lost race, is a lost race."""

    class SorryError(Exception):
        pass

    def work() -> None:
        try:
            statement_race.run()
        except OperationalError as error:
            raise SorryError from error

    assert ask(protect(list_app(work), statement_race.registry), "POST").body == b"done"


def test_a_commit_that_failed_for_another_reason_is_not_run_again(
    serializable: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """A violated constraint is raised at once, and logged as an error."""
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        serializable.add(Book(author_id=7))

    with pytest.raises(IntegrityError):
        ask(protect(list_app(work), serializable), "POST")

    assert len(attempts) == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_the_answer_to_a_failed_commit_comes_after_the_last_attempt(race: Race) -> None:
    """``commit_error`` answers, if at all, for the attempt that stays."""

    def sorry(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("303 See Other", [("Location", "/sorry")])
        return [b"sorry"]

    race.at = "commit"
    app = SessionMiddleware(list_app(race.run), race.registry, commit_error=sorry)
    assert ask(RetryMiddleware(app, backoff=0), "POST").body == b"done"
    assert race.attempts == 2

    race.lost = 9
    reply = ask(RetryMiddleware(app, backoff=0), "POST")
    assert (reply.status, race.attempts) == ("303 See Other", 5)


def test_a_deadlock_is_run_again(
    statement_race: Race, postgres_server: Server, postgres_database: Database
) -> None:
    """PostgreSQL's 40P01 is retried like a serialization failure."""
    registry = statement_race.registry
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("SELECT pg_advisory_xact_lock(1)"))
        if len(attempts) == 1:
            # The error that PostgreSQL raises in the one of the two that it chose.
            registry.execute(text("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$"))
        registry.add(Note(text="done"))

    assert ask(protect(list_app(work), registry), "POST").body == b"done"
    assert (len(attempts), postgres_database.notes()) == (2, ["done", "first"])


# -- what never is ------------------------------------------------------------------------------


class Restless:
    """An application whose request fails with an error that is worth a second try."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.before = before
        self.attempts = 0

    def __call__(self) -> None:
        self.attempts += 1
        self.before()
        raise Retry


def test_retry_is_an_order_to_run_again(plain: scoped_session[Session]) -> None:
    """``Retry`` needs no database error; after the last attempt it is an error like any other."""
    work = Restless()

    with pytest.raises(Retry):
        ask(protect(list_app(work), plain), "POST")

    assert work.attempts == 3


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_retry_is_obeyed_though_the_framework_made_a_page_of_it(
    framework: str, plain: scoped_session[Session]
) -> None:
    """The order counts when it is given, wherever it ends up."""

    class Subclass(Retry):
        pass

    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        if len(attempts) < 3:
            raise Subclass

    reply = ask(protect(FRAMEWORKS[framework](work), plain), "POST", b"a=b")

    assert (reply.status, reply.body, len(attempts)) == ("200 OK", b"done", 3)


@pytest.mark.parametrize("how", ["block", "empty block", "write()"])
def test_nothing_is_run_again_once_a_block_was_handed_on(
    how: str, plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """The client has seen a part of the attempt, so it is final."""
    caplog.set_level(logging.INFO)
    work = Restless()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        write = start_response("200 OK", TEXT)
        if how == "write()":
            write(b"written")
        else:
            yield b"" if how == "empty block" else b"block"
        work()

    with pytest.raises(Retry):
        ask(protect(app, plain))

    assert work.attempts == 1
    (message,) = caplog.messages
    assert message == (
        "GET /path: attempt 1 of 3 failed with Retry; it is the last one, "
        "because a part of its response was handed on"
    )


def _commit_plainly(session: scoped_session[Session]) -> None:
    session.add(Note(text="kept"))
    session.commit()


def _commit_in_block(session: scoped_session[Session]) -> None:
    with session_scope(session):
        session.add(Note(text="kept"))


def _commit_by_engine(session: scoped_session[Session]) -> None:
    engine: Any = session.get_bind()
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('kept')"))


def _commit_in_request(session: scoped_session[Session]) -> None:
    def inner(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        session.add(Note(text="kept"))
        start_response("200 OK", TEXT)
        return [b""]

    # With a copy of the environ, as Pyramid's wsgiapp2 makes one.
    environ = current_scope().environ
    assert environ is not None
    ask(SessionMiddleware(inner, session), **environ)


def _commit_by_itself(session: scoped_session[Session]) -> None:
    connection = session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    connection.execute(text("INSERT INTO note (text) VALUES ('kept')"))


COMMITS = {
    "the application": _commit_plainly,
    "an independent block": _commit_in_block,
    "an engine": _commit_by_engine,
    "a request in the request": _commit_in_request,
    "AUTOCOMMIT": _commit_by_itself,
}


@pytest.mark.parametrize("shape", [list_app, flask_app], ids=["raised", "error page"])
@pytest.mark.parametrize("by", COMMITS)
def test_nothing_is_run_again_once_something_was_committed(
    by: str,
    shape: Callable[[Callable[[], object]], WSGIApplication],
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever committed it, running it again would do it twice."""
    caplog.set_level(logging.INFO, "wsgi_dbsession")
    registry = registry_of(postgres_database.engine)
    work = Restless(lambda: COMMITS[by](registry))
    app = protect(shape(work), registry)

    if shape is list_app:
        with pytest.raises(Retry):
            ask(app, "POST")
    else:
        assert ask(app, "POST").status[:3] == "500"

    assert (work.attempts, postgres_database.notes()) == (1, ["kept"])
    reason = "something was committed in it"
    if by == "an engine":
        reason = "it used a connection without a Session, which may have committed"
    assert (
        f"POST /path: attempt 1 of 3 failed with Retry; it is the last one, because {reason}"
    ) in caplog.messages


def test_nothing_is_run_again_once_another_registry_was_committed(
    serializable: scoped_session[Session],
    postgres_server: Server,
    other_postgres_database: Database,
    postgres_database: Database,
) -> None:
    """Without two phases, one may be committed when the other is refused."""
    other = registry_of(other_postgres_database.engine)
    race = Race(serializable, postgres_server, "commit")

    def work() -> None:
        other.add(Note(text="committed"))
        race.run()

    with pytest.raises(OperationalError):
        ask(protect(list_app(work), other, serializable), "POST")
    assert race.attempts == 1
    assert other_postgres_database.notes() == ["committed"]

    # In the other order nothing is committed when the race is lost.
    race.attempts = 0
    ask(protect(list_app(work), serializable, other), "POST")
    assert race.attempts == 2
    assert other_postgres_database.notes() == ["committed", "committed"]


def test_two_phases_undo_what_another_registry_prepared(
    postgres_server: Server,
    serializable: scoped_session[Session],
    other_postgres_database: Database,
) -> None:
    """With two-phase sessions a lost race leaves nothing behind, so it is run again."""
    other = registry_of(other_postgres_database.engine, twophase=True)
    race = Race(serializable, postgres_server, "commit")

    def work() -> None:
        other.add(Note(text="committed"))
        race.run()

    assert ask(protect(list_app(work), other, serializable), "POST").body == b"done"
    assert race.attempts == 2
    assert other_postgres_database.notes() == ["committed"]


def test_a_prepared_transaction_that_was_committed_counts(
    postgres_database: Database, other_postgres_database: Database
) -> None:
    """The second phase is a commit."""
    one = registry_of(postgres_database.engine, twophase=True)
    two = registry_of(other_postgres_database.engine, twophase=True)

    def commit() -> None:
        with session_scope(one, two):
            one.add(Note(text="kept"))
            two.add(Note(text="kept"))

    work = Restless(commit)
    with pytest.raises(Retry):
        ask(protect(list_app(work), one, two), "POST")
    assert work.attempts == 1


def test_an_independent_block_that_was_rolled_back_is_no_commit(
    statement_race: Race, postgres_database: Database
) -> None:
    """What a block lost is lost, so the request may run again."""

    def work() -> None:
        with session_scope(statement_race.registry):
            statement_race.run()

    assert ask(protect(list_app(work), statement_race.registry), "POST").body == b"done"
    assert postgres_database.notes() == statement_race.done()


def test_a_savepoint_that_was_released_is_no_commit(plain: scoped_session[Session]) -> None:
    """It goes with the transaction around it."""

    def work() -> None:
        with plain.begin_nested():
            plain.execute(text("SELECT 1"))

    restless = Restless(work)
    with pytest.raises(Retry):
        ask(protect(list_app(restless), plain))
    assert restless.attempts == 3


def test_a_savepoint_that_was_rolled_back_hides_nothing(
    statement_race: Race, postgres_database: Database
) -> None:
    """The transaction around it counts all the same."""
    session = statement_race.registry
    other = postgres_database.engine

    def work() -> None:
        session.execute(
            text("INSERT INTO note (text) VALUES ('two')"), bind_arguments={"bind": other}
        )
        nested = session.begin_nested()
        nested.rollback()
        statement_race.run()

    assert ask(protect(list_app(work), session), "POST").body == b"done"


def test_a_lost_race_in_the_flush_of_the_commit_is_run_again(
    statement_race: Race, postgres_database: Database
) -> None:
    """No COMMIT was sent."""
    session = statement_race.registry

    def work() -> None:
        statement_race.attempts += 1
        note = session.scalars(select(Note)).one()
        note.text += "?"
        if statement_race.attempts == 1:
            statement_race.interfere("UPDATE note SET text = text || '!'")

    assert ask(protect(list_app(work), session), "POST").body == b"done"
    assert statement_race.attempts == 2
    assert postgres_database.notes() == ["first!?"]


def test_nothing_is_run_again_once_another_connection_of_the_session_may_be_committed(
    statement_race: Race, other_postgres_database: Database
) -> None:
    """One Session over two databases commits them one after the other, in no order."""
    session = statement_race.registry
    statement_race.at = "commit"

    def work() -> None:
        bind = {"bind": other_postgres_database.engine}
        session.execute(text("INSERT INTO note (text) VALUES ('perhaps')"), bind_arguments=bind)
        statement_race.run()

    with pytest.raises(OperationalError):
        ask(protect(list_app(work), session), "POST")
    assert statement_race.attempts == 1


def test_reading_with_autocommit_is_no_commit(
    statement_race: Race, postgres_database: Database
) -> None:
    """A read-only connection cannot write, so it does not matter that it commits by itself."""
    replica = postgres_database.engine.execution_options(
        isolation_level="AUTOCOMMIT", postgresql_readonly=True
    )

    def work() -> None:
        statement_race.registry.execute(text("SELECT 1"), bind_arguments={"bind": replica})
        statement_race.run()

    assert ask(protect(list_app(work), statement_race.registry), "POST").body == b"done"


def test_autocommit_of_a_whole_engine_is_seen(postgres_database: Database) -> None:
    """``create_engine(isolation_level="AUTOCOMMIT")`` commits each statement."""
    engine = make_engine(postgres_database.url, isolation_level="AUTOCOMMIT")
    registry = registry_of(engine)
    work = Restless(lambda: registry.execute(text("INSERT INTO note (text) VALUES ('kept')")))

    with pytest.raises(Retry):
        ask(protect(list_app(work), registry), "POST")

    engine.dispose()
    assert (work.attempts, postgres_database.notes()) == (1, ["kept"])


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
@pytest.mark.parametrize("shape", [list_app, lazy_app], ids=["call", "next()"])
def test_an_interruption_is_never_run_again(
    failure: type[BaseException],
    shape: Callable[[Callable[[], object]], WSGIApplication],
    plain: scoped_session[Session],
) -> None:
    """Neither a killed greenlet nor a timeout means to be tried again."""
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        try:
            raise Retry
        except Retry as error:
            raise failure from error

    with pytest.raises(failure):
        ask(protect(shape(work), plain))
    assert len(attempts) == 1


def test_a_request_that_is_skipped_is_left_alone(plain: scoped_session[Session]) -> None:
    """Without a scope nobody knows what was committed: it is passed through."""
    work = Restless()
    app = SessionMiddleware(list_app(work), plain, skip=lambda environ: True)

    with pytest.raises(Retry):
        ask(RetryMiddleware(app))
    assert work.attempts == 1

    blocks = [b"done"]
    reply = Reply()
    app = SessionMiddleware(lambda environ, start: blocks, plain, skip=lambda environ: True)
    assert RetryMiddleware(app)(make_environ(), reply.start) is blocks


def test_a_success_is_a_success(plain: scoped_session[Session]) -> None:
    """An error that the application has dealt with is not looked at."""
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        Retry()

    assert ask(protect(list_app(work), plain)).body == b"done"
    assert len(attempts) == 1


def test_an_error_after_the_commit_is_not_run_again(
    sqlite_database: Database, notes: scoped_session[Session]
) -> None:
    """The server refuses the response's start: the work is committed all the same."""
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        notes.add(Note(text="kept"))

    def refuse(*_: object) -> Any:
        raise Retry

    def run(app: WSGIApplication) -> None:
        result = app(make_environ("POST"), refuse)
        with contextlib.closing(result):  # type: ignore[type-var]
            list(result)

    for shape in (closing_app, file_app, list_app):
        with pytest.raises(Retry):
            run(protect(shape(work), notes))
    assert (len(attempts), Closing.closed) == (3, 1)
    assert sqlite_database.notes() == ["kept"] * 3


# -- attempts do not know each other --------------------------------------------------------------


def test_each_attempt_gets_the_environ_as_it_was(plain: scoped_session[Session]) -> None:
    """Neither the next attempt nor the server sees what an attempt has put there."""
    seen: list[WSGIEnvironment] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(dict(environ))
        environ["app.user"] = "somebody"
        environ["PATH_INFO"] = "/moved"
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    environ = make_environ()
    before = dict(environ)
    reply = Reply()
    protect(app, plain)(environ, reply.start)

    assert environ == before
    assert [each["PATH_INFO"] for each in seen] == ["/path"] * 3
    assert not any("app.user" in each for each in seen)
    scopes = [each["wsgi_dbsession.scope"] for each in seen]
    assert len({id(scope) for scope in scopes}) == 3
    assert all(scope.environ is None for scope in scopes)


def test_hooks_follow_the_outcome_of_their_attempt(
    race: Race, postgres_database: Database
) -> None:
    """A message is sent once, for the attempt that was committed; the others are undone."""
    happened: list[str] = []

    def work() -> None:
        number = race.attempts + 1
        scope = current_scope()
        scope.on_commit(lambda: happened.append(f"commit {number}"))
        scope.on_rollback(lambda: happened.append(f"rollback {number}"))
        race.run()

    ask(protect(list_app(work), race.registry), "POST")

    assert happened == ["rollback 1", "commit 2"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_of_a_failed_attempt_is_never_sent(
    shape: str, plain: scoped_session[Session]
) -> None:
    """Statuses and headers are those of the attempt that stays."""
    attempts: list[None] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def work() -> None:
            if len(attempts) < 3:
                raise Retry

        def start(*args: Any) -> Any:
            _, headers, *rest = args
            return start_response(
                f"20{len(attempts)} OK", [*headers, ("X-Try", str(len(attempts)))], *rest
            )

        attempts.append(None)
        return SHAPES[shape](work)(environ, start)

    reply = ask(protect(app, plain))

    assert (reply.status, reply.starts) == ("203 OK", 1)
    assert ("X-Try", "3") in reply.headers


def test_a_start_that_is_replaced_stays_replaced(plain: scoped_session[Session]) -> None:
    """``exc_info`` reaches the server, before and after the first block."""
    failure = ValueError("too late")

    def early(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        start_response("503 Sorry", TEXT, (ValueError, failure, None))  # type: ignore[arg-type]
        return [b"sorry"]

    def late(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        yield b"block"
        start_response("503 Sorry", TEXT, (ValueError, failure, None))  # type: ignore[arg-type]
        yield b"sorry"

    reply = ask(protect(early, plain))
    assert (reply.status, reply.body) == ("503 Sorry", b"sorry")
    with pytest.raises(ValueError, match="too late"):
        ask(protect(late, plain))


def test_a_second_start_without_a_reason_is_the_servers_business(
    plain: scoped_session[Session],
) -> None:
    """The server that would have refused it refuses it still."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        start_response("404 Not Found", SIZED)
        return [b"done"]

    unprotected = SessionMiddleware(app, plain, skip=lambda environ: True)
    with pytest.raises(AssertionError, match="start_response was called twice"):
        ask(RetryMiddleware(unprotected))


def test_what_is_written_before_the_end_goes_out_in_order(
    notes: scoped_session[Session], sqlite_database: Database
) -> None:
    """``write()`` hands on at once, and the work is committed at the end."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", TEXT)
        write(b"one ")
        notes.add(Note(text="kept"))
        write(b"two ")
        return [b"three"]

    assert ask(protect(app, notes), "POST").body == b"one two three"
    assert sqlite_database.notes() == ["kept"]


@pytest.mark.parametrize("status", ["200 OK", "204 No Content"])
def test_a_response_of_headers_only_is_run_again(
    status: str, race: Race, postgres_database: Database
) -> None:
    """A server that does not iterate over the body of a HEAD gets its start all the same."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, TEXT)
        race.run()
        return Closing([b""])

    reply = Reply()
    result = protect(app, race.registry)(make_environ("HEAD"), reply.start)
    result.close()

    assert (reply.status, reply.starts, race.attempts) == (status, 1, 2)
    assert sorted(postgres_database.notes()) == race.done()
    assert Closing.closed == (1 if race.at == "statement" else 2)


def test_an_error_page_of_headers_only_is_run_again(statement_race: Race) -> None:
    """The same with the 500 that a framework made of a HEAD."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status = "200 OK"
        try:
            statement_race.run()
        except OperationalError:
            status = "500 Internal Server Error"
        start_response(status, TEXT)
        return Closing([])

    reply = Reply()
    protect(app, statement_race.registry)(make_environ("HEAD"), reply.start).close()

    assert (reply.status, reply.starts, statement_race.attempts) == ("200 OK", 1, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_error_comes_out_of_the_call(shape: str, race: Race) -> None:
    """Some servers answer with a 500 only what the call of the application raises."""
    race.lost = 9
    app = protect(SHAPES[shape](race.run), race.registry)

    with pytest.raises(OperationalError):
        app(make_environ(), Reply().start)
    assert race.attempts == 3


@pytest.mark.parametrize("empty", [Closing([]), iter(())], ids=["with close()", "without"])
def test_a_body_without_blocks_is_a_whole_response(
    empty: Iterable[bytes], plain: scoped_session[Session]
) -> None:
    """The start goes out when the end is known."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        return empty

    reply = ask(protect(app, plain))

    assert (reply.status, reply.blocks) == ("200 OK", [])


def test_attempts_may_respond_in_different_ways(plain: scoped_session[Session]) -> None:
    """The first fails in a generator, the second returns a list."""
    bodies = [lazy_app(Restless()), list_app(lambda: None)]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return bodies.pop(0)(environ, start_response)

    assert ask(protect(app, plain)).body == b"done"
    assert Closing.closed == 1


def test_nothing_is_run_again_for_a_client_that_has_gone(plain: scoped_session[Session]) -> None:
    """A response that is closed before its first block is wanted by nobody."""

    class Failing(Closing):
        def close(self) -> None:
            super().close()
            raise Retry

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        return Failing([b"done"])

    result = protect(app, plain)(make_environ(), Reply().start)
    with pytest.raises(Retry):
        result.close()
    assert Closing.closed == 1


def test_a_failed_attempt_whose_close_fails_is_run_again(
    plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """The error of the clean-up is logged, and does not stand in the way."""
    attempts: list[None] = []

    class Page(Closing):
        def close(self) -> None:
            super().close()
            if len(attempts) == 1:
                raise ValueError("close() failed")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        attempts.append(None)
        if len(attempts) == 1:
            Retry()
            start_response("500 Sorry", TEXT)
        else:
            start_response("200 OK", TEXT)
        return Page([b"page"])

    reply = ask(protect(app, plain))

    assert (reply.status, reply.body) == ("200 OK", b"page")
    assert (len(attempts), Closing.closed) == (2, 2)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.exc_info is not None


def test_a_page_whose_close_commits_is_the_last_one(
    notes: scoped_session[Session], sqlite_database: Database
) -> None:
    """What runs in ``close()`` may commit, and then there is no way back."""
    attempts: list[None] = []

    class Page(Closing):
        def close(self) -> None:
            super().close()
            notes.add(Note(text="kept"))
            notes.commit()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        attempts.append(None)
        Retry()
        start_response("500 Sorry", TEXT)
        return Page([b"page"])

    reply = ask(protect(app, notes), "POST")

    assert (reply.status, reply.body) == ("500 Sorry", b"page")
    assert (len(attempts), Closing.closed) == (1, 1)
    assert sqlite_database.notes() == ["kept"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_finished_response_is_handed_on_as_it_is(
    kind: type[list[bytes]], notes: scoped_session[Session]
) -> None:
    """The server gets the very list, or the file wrapper, so that its fast paths stay."""
    blocks = kind([b"done"])
    files: list[FileWrapper] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        return blocks

    def send(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        files.append(FileWrapper(io.BytesIO(b"done")))
        notes.add(Note(text="kept"))
        return files[-1]

    assert protect(app, notes)(make_environ(), Reply().start) is blocks
    assert protect(send, notes)(make_environ(), Reply().start) is files[0]


@pytest.mark.parametrize("commit_on", ["headers", "close"])
def test_other_moments_of_the_outcome_have_their_own_last_chance(
    commit_on: Any, race: Race, postgres_database: Database
) -> None:
    """What fails before the first block is run again; a COMMIT in ``close()`` comes too late."""
    app = SessionMiddleware(lazy_app(race.run), race.registry, commit_on=commit_on)

    if commit_on == "close" and race.at == "commit":
        with pytest.raises(OperationalError):
            ask(RetryMiddleware(app, backoff=0), "POST")
        assert race.attempts == 1
    else:
        assert ask(RetryMiddleware(app, backoff=0), "POST").body == b"done"
        assert sorted(postgres_database.notes()) == race.done()


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_left_behind_by_attempts(shape: str, plain: scoped_session[Session]) -> None:
    """The scopes of all attempts are freed at once, without the garbage collector."""
    scopes: list[weakref.ref[Any]] = []

    class Marker:
        pass

    def work() -> None:
        marker = Marker()
        scopes.append(weakref.ref(marker))
        current_scope().info["marker"] = marker
        if len(scopes) < 3:
            raise Retry

    gc.collect()
    gc.disable()
    try:
        assert ask(protect(SHAPES[shape](work), plain)).body == b"done"
        assert [scope() for scope in scopes] == [None] * 3
    finally:
        gc.enable()


def test_a_response_that_is_never_closed_leaves_nothing(
    sqlite_database: Database, notes: scoped_session[Session]
) -> None:
    """Once it is unreachable, its work is rolled back and its connection is returned."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        notes.add(Note(text="lost"))
        notes.flush()
        start_response("200 OK", TEXT)
        return Closing([b"one", b"two"])

    pool: Any = sqlite_database.engine.pool
    gc.disable()
    try:
        result = protect(app, notes)(make_environ("POST"), Reply().start)
        assert pool.checkedout() == 1
        del result
        assert pool.checkedout() == 0
    finally:
        gc.enable()
    assert notes.registry.registry == {}
    assert sqlite_database.notes() == []


# -- requests in requests -------------------------------------------------------------------------


def test_the_outermost_middleware_decides(plain: scoped_session[Session]) -> None:
    """A protected application inside of another one leaves its failure to that one."""
    work = Restless()
    inner = protect(list_app(work), plain, attempts=9)

    with pytest.raises(Retry):
        ask(protect(inner, plain))

    assert work.attempts == 3


def test_a_request_in_a_request_is_a_unit_of_its_own(
    statement_race: Race, postgres_database: Database
) -> None:
    """It is run again by itself; what it committed forbids another try of the outer one."""
    outer_attempts: list[None] = []
    protected = protect(list_app(statement_race.run), statement_race.registry)

    def outer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        outer_attempts.append(None)
        assert ask(protected, **environ).body == b"done"
        raise Retry

    with pytest.raises(Retry):
        ask(protect(outer, statement_race.registry))

    assert (len(outer_attempts), statement_race.attempts) == (1, 2)
    assert postgres_database.notes() == statement_race.done()


@pytest.mark.parametrize("copied", [True, False], ids=["copied environ", "new environ"])
def test_a_lost_race_of_a_request_in_a_request_is_one_of_the_outer(
    copied: bool, race: Race, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Without protection of its own, its error page makes the outer one run again."""
    unprotected = SessionMiddleware(list_app(race.run), race.registry)

    def outer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        reply = ask(unprotected, "POST", **(environ if copied else {}))
        start_response(reply.status, SIZED)
        return reply.blocks

    assert ask(protect(outer, race.registry), "POST").body == b"done"
    assert sorted(postgres_database.notes()) == race.done()
    # The failed commit of the inner one is not known to be run again, so it is logged.
    assert len(caplog.records) == (race.at == "commit")


# -- constructors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"attempts": 0}, ValueError, "attempts is a number from 1", id="no attempt"),
        pytest.param({"max_body": -1}, ValueError, "max_body is a number of bytes", id="body"),
        pytest.param({"backoff": -1}, ValueError, "backoff is a number of seconds", id="backoff"),
        pytest.param({"max_backoff": -1}, ValueError, "max_backoff is", id="largest backoff"),
        pytest.param({"give_up_after": -1}, ValueError, "give_up_after is", id="time"),
        pytest.param({"also": Retry()}, TypeError, "also is a callable", id="predicate"),
    ],
)
def test_a_wrong_argument_is_refused_when_the_application_is_built(
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    plain: scoped_session[Session],
) -> None:
    """The message names the argument and what it should be."""
    app = SessionMiddleware(list_app(lambda: None), plain)

    with pytest.raises(error, match=message):
        RetryMiddleware(app, **arguments)
    if "max_body" not in arguments:
        with pytest.raises(error, match=message):
            run_transaction(lambda: None, plain, **arguments)


def test_the_wrong_order_is_refused_when_the_application_is_built(
    plain: scoped_session[Session],
) -> None:
    """Inside of SessionMiddleware nothing can be undone, and around anything else neither."""
    app: Any = list_app(lambda: None)

    with pytest.raises(TypeError, match=r"RetryMiddleware\(SessionMiddleware\(app, Session\)\)"):
        SessionMiddleware(RetryMiddleware(app), plain)
    with pytest.raises(TypeError, match="Other middleware goes around both, or inside of both"):
        RetryMiddleware(validator(SessionMiddleware(app, plain)))  # type: ignore[arg-type]


def test_a_middleware_inside_of_an_unprotected_scope_says_so(
    plain: scoped_session[Session],
) -> None:
    """The mistake that no constructor can see is told with the first request."""
    app = SessionMiddleware(protect(list_app(lambda: None), plain), plain)

    with pytest.raises(RuntimeError, match="put it around the outermost"):
        ask(app)


# -- by choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [list_app, flask_app], ids=["raised", "error page"])
def test_a_stale_row_is_run_again_by_choice(
    shape: Callable[[Callable[[], object]], WSGIApplication],
    sqlite_database: Database,
) -> None:
    """Optimistic locking is no error of the database, so it takes a predicate."""
    engine = sqlite_database.engine
    registry = registry_of(engine)
    attempts: list[None] = []
    with session_scope(registry):
        registry.add(Author(id=1))

    def work() -> None:
        attempts.append(None)
        author = registry.get(Author, 1)
        assert author is not None
        author.name += "changed"
        if len(attempts) == 1:
            # Somebody else deletes the row, as far as this attempt can see.
            registry.connection().execute(text("DELETE FROM author"))
        registry.flush()

    def commit_and_work() -> None:
        with session_scope(registry):
            registry.add(Note(text="kept"))
        work()

    def is_stale(error: BaseException) -> bool:
        return isinstance(error, StaleDataError)

    app = shape(work)
    if shape is list_app:
        with pytest.raises(StaleDataError):
            ask(protect(app, registry), "POST")
    else:
        assert ask(protect(app, registry), "POST").status[:3] == "500"
    assert len(attempts) == 1

    attempts.clear()
    assert ask(protect(app, registry, also=is_stale), "POST").body == b"done"
    assert sqlite_database.committed(Author.name) == ["changed"]

    # Not even then, if something was committed.
    attempts.clear()
    app = protect(shape(commit_and_work), registry, also=is_stale)
    if shape is list_app:
        with pytest.raises(StaleDataError):
            ask(app, "POST")
    else:
        assert ask(app, "POST").status[:3] == "500"
    assert len(attempts) == 1


def test_a_locked_sqlite_database_is_run_again_by_choice(sqlite_database: Database) -> None:
    """SQLite says with a message only that somebody else writes."""
    engine = make_engine(sqlite_database.url, connect_args={"timeout": 0})
    registry = registry_of(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        with contextlib.ExitStack() as stack:
            if len(attempts) == 1:
                # Not by an engine: that may commit.
                path = str(sqlite_database.url.database)
                other = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
                other.execute("INSERT INTO note (text) VALUES ('theirs')")
            registry.add(Note(text="mine"))
            registry.flush()

    def is_locked(error: BaseException) -> bool:
        return isinstance(error, OperationalError) and "database is locked" in str(error.orig)

    with pytest.raises(OperationalError):
        ask(protect(list_app(work), registry), "POST")
    attempts.clear()
    assert ask(protect(list_app(work), registry, also=is_locked), "POST").body == b"done"

    engine.dispose()
    assert (len(attempts), sqlite_database.notes()) == (2, ["mine"])


# -- time -----------------------------------------------------------------------------------------


def delays_of(caplog: pytest.LogCaptureFixture) -> list[float]:
    return [
        float(record.getMessage().split()[-2])
        for record in caplog.records
        if "the next one begins in" in record.getMessage()
    ]


def test_the_delay_is_random_below_a_limit_that_doubles(
    plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """Exponential backoff with full jitter, up to a largest limit."""
    caplog.set_level(logging.INFO)
    limits = [0.001, 0.002, 0.004, 0.005, 0.005, 0.005, 0.005]
    for _ in range(5):
        with pytest.raises(Retry):
            ask(protect(list_app(Restless()), plain, attempts=8, backoff=0.001, max_backoff=0.005))
    delays = delays_of(caplog)
    assert len(delays) == 5 * 7
    assert all(0 <= delay <= limits[number % 7] for number, delay in enumerate(delays))
    assert len(set(delays)) > 3


def test_no_attempt_begins_when_time_is_up(
    plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """``give_up_after`` bounds the time that a client waits for the last attempt to begin."""
    caplog.set_level(logging.INFO)
    work = Restless()
    with pytest.raises(Retry):
        ask(protect(list_app(work), plain, give_up_after=0))
    assert work.attempts == 1

    work = Restless()
    with pytest.raises(Retry):
        ask(
            protect(
                list_app(work),
                plain,
                attempts=10**6,
                backoff=1000,
                max_backoff=1000,
                give_up_after=0.05,
            )
        )
    assert work.attempts >= 2
    assert max(delays_of(caplog)) <= 0.05


def test_a_pause_lets_other_greenlets_run() -> None:
    """Under gevent the pause yields, also if the module was imported before the patching."""
    script = """
import wsgi_dbsession.retry
from gevent import monkey
monkey.patch_all()
import gevent
from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker
from wsgi_dbsession import current_scope
from wsgi_dbsession.retry import Retry, run_transaction

Session = scoped_session(sessionmaker(create_engine("sqlite://")), scopefunc=current_scope)
other = []

def work():
    if not other:
        raise Retry

def run():
    run_transaction(work, Session, attempts=100, backoff=0.02, max_backoff=0.02)

pausing = gevent.spawn(run)
gevent.spawn(other.append, None)
pausing.get(timeout=10)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# -- outside of requests --------------------------------------------------------------------------


def test_a_job_that_lost_a_race_is_run_again(
    race: Race, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """``run_transaction`` returns what the function returned in the attempt that was committed."""
    caplog.set_level(logging.INFO)

    def job() -> int:
        race.run()
        return race.attempts

    assert run_transaction(job, race.registry, backoff=0) == 2
    assert sorted(postgres_database.notes()) == race.done()
    (message,) = caplog.messages
    assert message == (
        "test_a_job_that_lost_a_race_is_run_again.<locals>.job(): attempt 1 of 3 failed with "
        "SerializationFailure (40001); the next one begins in 0.000 s"
    )


def test_a_job_that_swallowed_a_lost_race_is_run_again(
    statement_race: Race, postgres_database: Database
) -> None:
    """It cannot commit, and the reason is known."""

    def job() -> None:
        with contextlib.suppress(OperationalError):
            statement_race.run()

    run_transaction(job, statement_race.registry, backoff=0)
    assert postgres_database.notes() == statement_race.done()


def test_the_last_error_of_a_job_is_raised(race: Race) -> None:
    """When attempts run out, the caller hears of it."""
    race.lost = 9
    with pytest.raises(OperationalError):
        run_transaction(race.run, race.registry, attempts=4, backoff=0)
    assert race.attempts == 4


@pytest.mark.parametrize("by", [name for name in COMMITS if name != "a request in the request"])
def test_a_job_is_not_run_again_once_something_was_committed(
    by: str, postgres_database: Database
) -> None:
    """The rules are those of requests."""
    registry = registry_of(postgres_database.engine)
    work = Restless(lambda: COMMITS[by](registry))

    with pytest.raises(Retry):
        run_transaction(work, registry, backoff=0)

    assert (work.attempts, postgres_database.notes()) == (1, ["kept"])


def test_a_job_inside_of_a_request_is_a_unit_of_its_own(
    statement_race: Race, postgres_database: Database
) -> None:
    """It is run again by itself; what it committed forbids another try of the request."""
    requests: list[None] = []

    def work() -> None:
        requests.append(None)
        run_transaction(statement_race.run, statement_race.registry, backoff=0)
        raise Retry

    with pytest.raises(Retry):
        ask(protect(list_app(work), statement_race.registry), "POST")

    assert (len(requests), statement_race.attempts) == (1, 2)
    assert postgres_database.notes() == statement_race.done()


def test_a_job_that_would_run_after_its_block_is_refused(plain: scoped_session[Session]) -> None:
    """A generator function has done nothing when its call returns."""

    def job() -> Iterator[None]:
        yield

    with pytest.raises(TypeError, match="runs after its call has returned"):
        run_transaction(job, plain)
    with pytest.raises(ValueError, match="no session registry was given"):
        run_transaction(lambda: None)


# -- the body of the request ----------------------------------------------------------------------


class Socket(io.BytesIO):
    """A body that says how much of it was read."""

    @property
    def left(self) -> int:
        return len(self.getvalue()) - self.tell()


def over(source: io.BytesIO) -> dict[str, Any]:
    return {"wsgi.input": source}


def _read_all(stream: Any) -> list[bytes]:
    return [stream.read()]


def _read_by_number(stream: Any) -> list[bytes]:
    return [stream.read(10_000_000)]


def _read_none(stream: Any) -> list[bytes]:
    return [stream.read(None)]


def _read_in_bits(stream: Any) -> list[bytes]:
    return list(iter(lambda: stream.read(7), b""))


def _read_lines(stream: Any) -> list[bytes]:
    return list(iter(stream.readline, b""))


def _read_bits_of_lines(stream: Any) -> list[bytes]:
    return list(iter(lambda: stream.readline(5), b""))


def _iterate(stream: Any) -> list[bytes]:
    return list(stream)


def _read_list(stream: Any) -> list[bytes]:
    lines: list[bytes] = stream.readlines()
    return lines


def _read_list_with_hint(stream: Any) -> list[bytes]:
    first: list[bytes] = stream.readlines(20)
    rest: list[bytes] = stream.readlines(None)
    return first + rest


READERS = {
    "read()": _read_all,
    "read(n)": _read_by_number,
    "read(None)": _read_none,
    "read(7) to the end": _read_in_bits,
    "readline()": _read_lines,
    "readline(5)": _read_bits_of_lines,
    "iteration": _iterate,
    "readlines()": _read_list,
    "readlines(20)": _read_list_with_hint,
}
BODY = b"".join(b"line %d of the body\n" % number for number in range(20)) + b"no newline"


@pytest.mark.parametrize("second", READERS)
@pytest.mark.parametrize("first", READERS)
def test_each_attempt_reads_the_whole_body(
    first: str, second: str, plain: scoped_session[Session]
) -> None:
    """However an attempt reads, the next one begins at the first byte, and gets the same."""
    seen: list[list[bytes]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        reader = READERS[first if len(seen) == 0 else second]
        seen.append(reader(environ["wsgi.input"]))
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    assert ask(protect(app, plain), "POST", BODY).body == b"done"

    assert seen[0] == READERS[first](io.BytesIO(BODY))
    assert seen[1] == seen[2] == READERS[second](io.BytesIO(BODY))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", [0, 5, 25])
def test_a_body_that_was_read_in_part_is_replayed_and_read_on(
    part: int, reader: str, plain: scoped_session[Session]
) -> None:
    """Nothing is read ahead: what the first attempt left is still on the server's side."""
    source = Socket(BODY)
    left: list[int] = []
    seen: list[list[bytes]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stream = environ["wsgi.input"]
        left.append(source.left)
        if len(left) == 1:
            assert stream.read(part) == BODY[:part]
            assert stream.readline(0) == b""
            raise Retry
        seen.append(READERS[reader](stream))
        start_response("200 OK", SIZED)
        return [b"done"]

    more: dict[str, Any] = {"wsgi.input": source, "CONTENT_LENGTH": str(len(BODY))}
    assert ask(protect(app, plain), "POST", **more).body == b"done"

    assert left == [len(BODY), len(BODY) - part]
    assert seen == [READERS[reader](io.BytesIO(BODY))]


def test_a_body_that_nobody_reads_stays_where_it_is(plain: scoped_session[Session]) -> None:
    """The server can go on with it as it likes."""
    source = Socket(BODY)

    with pytest.raises(Retry):
        ask(protect(list_app(Restless()), plain), "POST", **over(source))

    assert source.left == len(BODY)


def test_the_end_of_a_body_is_asked_for_once(plain: scoped_session[Session]) -> None:
    """On some servers, reading beyond the end would wait for the next request."""

    class Once(io.BytesIO):
        ends = 0

        def read(self, size: int | None = -1, /) -> bytes:
            block = super().read(size)
            self.ends += not block
            assert self.ends < 2
            return block

    seen: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stream = environ["wsgi.input"]
        seen.append(b"".join(iter(lambda: stream.read(100), b"")))
        raise Retry

    with pytest.raises(Retry):
        ask(protect(app, plain), "POST", **over(Once(BODY)))
    assert seen == [BODY] * 3


@pytest.mark.parametrize("length", ["declared", "not declared", "not a number"])
@pytest.mark.parametrize("size", [1000, 1001, 1300])
def test_a_body_larger_than_the_bound_is_not_kept(
    size: int, length: str, plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """The request is run once then, and the log says why; up to the bound it is run again."""
    caplog.set_level(logging.INFO)
    seen: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stream = environ["wsgi.input"]
        seen.append(b"".join(iter(lambda: stream.read(100), b"")))
        raise Retry

    body = b"x" * size
    more: dict[str, Any] = {"wsgi.input": io.BytesIO(body)}
    if length == "declared":
        more["CONTENT_LENGTH"] = str(size)
    elif length == "not a number":
        more["CONTENT_LENGTH"] = "many"
    with pytest.raises(Retry):
        ask(protect(app, plain, max_body=1000), "POST", **more)

    assert seen == [body] * (3 if size == 1000 else 1)
    if size > 1000:
        attempts = 1 if length == "declared" else 3
        (message,) = caplog.messages
        assert message == (
            f"POST /path: attempt 1 of {attempts} failed with Retry; it is the last one, "
            "because its body is longer than max_body"
        )


def test_a_large_body_that_is_not_read_may_run_again(plain: scoped_session[Session]) -> None:
    """Without a declared length, it is what was read that counts."""
    work = Restless()

    with pytest.raises(Retry):
        ask(
            protect(list_app(work), plain, max_body=10),
            "POST",
            HTTP_TRANSFER_ENCODING="chunked",
            **over(io.BytesIO(BODY)),
        )
    assert work.attempts == 3


def test_a_body_is_kept_on_disk_beyond_some_size(plain: scoped_session[Session]) -> None:
    """A body of half a megabyte comes back as it was, and leaves no file open."""
    body = bytes(range(256)) * 2048
    seen: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stream = environ["wsgi.input"]
        seen.append(b"".join(iter(lambda: stream.read(50_000 * (len(seen) + 1)), b"")))
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    assert ask(protect(app, plain), "POST", body).body == b"done"
    assert seen == [body] * 3


def boundary_body(content: bytes) -> tuple[bytes, str]:
    head = (
        b'--BOUND\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\n"
    )
    body = head + content + b"\r\n--BOUND--\r\n"
    return body, "multipart/form-data; boundary=BOUND"


def _form_of_flask(environ: WSGIEnvironment) -> object:
    request = flask.Request(environ)
    if request.mimetype == "application/json":
        return request.get_json()
    if "file" not in request.files:
        return request.form["text"]
    with contextlib.closing(request.files["file"]) as upload:
        return upload.read().decode()


def _form_of_bottle(environ: WSGIEnvironment) -> object:
    request = bottle.BaseRequest(environ)
    if "json" in environ["CONTENT_TYPE"]:
        return request.json
    if "multipart" not in environ["CONTENT_TYPE"]:
        return request.forms.get("text")
    with contextlib.closing(request.body), request.files["file"].file as upload:
        return upload.read().decode()


def _form_of_pyramid(environ: WSGIEnvironment) -> object:
    request = PyramidRequest(environ)
    if "json" in environ["CONTENT_TYPE"]:
        return request.json_body
    if "multipart" not in environ["CONTENT_TYPE"]:
        return request.POST["text"]
    # It reads into a file of its own.
    with request.POST["file"].file as upload, contextlib.closing(environ["wsgi.input"]):
        return upload.read().decode()


def _form_of_falcon(environ: WSGIEnvironment) -> object:
    request = falcon.Request(environ)
    if "multipart" in environ["CONTENT_TYPE"]:
        (text,) = [part.stream.read().decode() for part in request.get_media()]
        return text
    media = request.get_media()
    return media.get("text") if isinstance(media, dict) else media


@pytest.mark.parametrize("body", ["form", "JSON", "upload"])
@pytest.mark.parametrize(
    "parse",
    [_form_of_flask, _form_of_bottle, _form_of_pyramid, _form_of_falcon],
    ids=["Flask", "Bottle", "Pyramid", "Falcon"],
)
def test_forms_and_uploads_are_parsed_in_each_attempt(
    parse: Callable[[WSGIEnvironment], object], body: str, plain: scoped_session[Session]
) -> None:
    """The framework's own parser sees what the client sent, each time."""
    content, kind = {
        "form": (b"text=hello", "application/x-www-form-urlencoded"),
        "JSON": (b'["hello"]', "application/json"),
        "upload": boundary_body(b"hello" * 50_000),
    }[body]
    expected = {"form": "hello", "JSON": ["hello"], "upload": "hello" * 50_000}[body]
    seen: list[object] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(parse(environ))
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    assert ask(protect(app, plain), "POST", content, CONTENT_TYPE=kind).body == b"done"
    assert seen == [expected] * 3
