"""A Session that the application keeps does not lose work after it was closed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event, insert, select, text

from tests.support.models import Database, Note
from tests.support.wsgi import BODIES, Program, ask, assert_nothing_left, drive, make_environ
from wsgi_dbsession import SessionMiddleware, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("no silent loss", "discarded")


def add(session: Session) -> None:
    session.add(Note(text="a"))


def add_and_flush(session: Session) -> None:
    session.add(Note(text="a"))
    session.flush()


def execute(session: Session) -> None:
    session.execute(insert(Note).values(text="a"))


def execute_in_a_block(session: Session) -> None:
    with session.begin():
        session.execute(insert(Note).values(text="a"))


def execute_in_a_savepoint(session: Session) -> None:
    with session.begin_nested():
        session.execute(insert(Note).values(text="a"))


def read(session: Session) -> None:
    session.scalars(select(Note)).all()


USES: dict[str, Callable[[Session], None]] = {
    "an object that is added": add,
    "an object that is flushed": add_and_flush,
    "a statement": execute,
    "a statement in begin()": execute_in_a_block,
    "a statement in begin_nested()": execute_in_a_savepoint,
    "a SELECT": read,
}


class Notes:
    """A repository, as dependency injection makes it: once, in the first request."""

    def __init__(self, registry: Registry, use: Callable[[Session], None] = add) -> None:
        self.registry = registry
        self.session: Session | None = None
        self.use = use

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        if self.session is None:
            self.session = self.registry()
        self.use(self.session)
        start_response("201 Created", [])
        return [b"done"]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_session_of_another_request_is_refused(
    sqlite_database: Database, sqlite_registry: Registry, use: Callable[[Session], None]
) -> None:
    """At each use: the application may swallow the first error."""
    app = SessionMiddleware(Notes(sqlite_registry, use), sqlite_registry)

    first, *others = (ask(app, "POST", "/notes") for _ in range(3))

    assert first.status == "201 Created"
    for reply in others:
        assert reply.status.startswith("500")
        (error,) = reply.errors
        assert str(error).startswith("POST /notes: nothing would commit a Session that was kept")
        assert "Keep the scoped_session" in str(error)
    assert sqlite_database.notes() == ([] if use is read else ["a"])


def test_a_session_of_another_block_is_refused_again(sqlite_registry: Registry) -> None:
    """Also by the statement that follows the error that was swallowed."""
    with session_scope(sqlite_registry):
        kept = sqlite_registry()

    with session_scope(sqlite_registry, name="nightly") as scope:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="nightly: nothing would commit a Session"):
                add(kept)
            assert not kept.in_transaction()

    assert scope.outcome is None


def test_a_session_of_another_request_can_be_given_to_the_registry(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """Then it is this scope's own."""
    with session_scope(sqlite_registry):
        kept = sqlite_registry()

    with session_scope(sqlite_registry):
        sqlite_registry.registry.set(kept)
        add(kept)

    assert sqlite_database.notes() == ["a"]


def test_a_session_is_its_owners_outside_of_scopes(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """It is a plain Session then: the owner commits it."""
    with session_scope(sqlite_registry):
        kept = sqlite_registry()

    add(kept)
    kept.commit()
    kept.close()

    assert sqlite_database.notes() == ["a"]


def test_the_session_of_an_outer_scope_is_used_in_a_block(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """It is not closed, and has the outer scope's outcome."""
    with session_scope(sqlite_registry):
        outer = sqlite_registry()
        with session_scope(sqlite_registry) as inner:
            inner.doom()
            add(outer)

    assert sqlite_database.notes() == ["a"]


def test_the_session_of_a_running_scope_is_used_in_a_threads_block(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """The scope waits for the thread: that is correct."""

    def work(session: Session) -> None:
        with session_scope(sqlite_registry):
            add(session)

    with session_scope(sqlite_registry):
        thread = threading.Thread(target=work, args=[sqlite_registry()])
        thread.start()
        thread.join()

    assert sqlite_database.notes() == ["a"]


def test_the_session_of_a_stream_is_refused_between_its_steps(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """Or the work of one request would wait for the client of another."""
    kept: list[Session] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/stream":
            kept.append(sqlite_registry())
            start_response("200 OK", [])
            yield b"1"
            yield b"2"
        else:
            add(kept[0])
            start_response("201 Created", [])
            yield b"done"

    middleware = SessionMiddleware(app, sqlite_registry)
    stream = iter(middleware(make_environ(path="/stream"), lambda *_: print))
    assert next(stream) == b"1"
    reply = ask(middleware, "POST", "/other")

    assert reply.status.startswith("500")
    assert "was kept from another scope" in str(reply.errors)
    assert list(stream) == [b"2"]
    assert sqlite_database.notes() == []


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_session_that_was_removed_stays_its_scopes(
    postgres_database: Database, postgres_registry: Registry, use: Callable[[Session], None]
) -> None:
    """What it does afterwards shares the outcome, next to the Session that took its place."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        session = postgres_registry()
        postgres_registry.remove()
        postgres_registry.add(Note(text="new"))
        postgres_registry.flush()
        use(session)
        start_response(environ["QUERY_STRING"], [])
        return [b"done"]

    middleware = SessionMiddleware(app, postgres_registry)

    drive(middleware, "POST", QUERY_STRING="404 Not Found")
    assert postgres_database.notes() == (["a"] if use is execute_in_a_block else [])
    assert_nothing_left(postgres_registry)
    drive(middleware, "POST", QUERY_STRING="201 Created")

    expected = [] if use is read else ["a"]
    assert set(postgres_database.notes()) == {"new", *expected}
    assert_nothing_left(postgres_registry)


def test_a_session_that_was_removed_twice(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """Each comes back."""
    with session_scope(sqlite_registry) as scope:
        session = sqlite_registry()
        sqlite_registry.remove()
        other = sqlite_registry()
        sqlite_registry.remove()
        session.info["number"], other.info["number"] = 1, 2
        for each in (session, other):
            each.add(Note(text=str(each.info["number"])))
            each.commit()
        session.add(Note(text="3"))
        assert len(scope.sessions) == 2

    assert sqlite_database.notes() == ["1", "2", "3"]


def test_a_discard_by_a_session_that_was_removed(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """It is like any other."""
    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(sqlite_registry),
    ):
        session = sqlite_registry()
        sqlite_registry.remove()
        execute(session)
        session.close()

    assert sqlite_database.notes() == []


def test_a_stream_reads_by_a_session_that_a_teardown_removed(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """The connection is back in the pool once the response is closed."""
    with session_scope(sqlite_registry):
        sqlite_registry.add(Note(text="a"))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        session = sqlite_registry()

        def stream() -> Iterable[bytes]:
            for note in session.scalars(select(Note)):
                yield note.text.encode()

        sqlite_registry.remove()
        start_response("200 OK", [])
        return stream()

    server = drive(SessionMiddleware(app, sqlite_registry))

    assert server.body == b"a"
    assert_nothing_left(sqlite_registry)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_session_that_is_kept_for_the_stream_is_committed(
    sqlite_database: Database, sqlite_registry: Registry, use: Callable[[Session], None]
) -> None:
    """Though no registry is asked for it after the outcome."""
    kept: list[Session] = []
    program = Program(lambda: kept.append(sqlite_registry()), lambda: use(kept[0]), kept.clear)
    app = BODIES["unsized generator"](program)

    drive(SessionMiddleware(app, sqlite_registry, commit_on="headers"))

    assert sqlite_database.notes() == ([] if use is read else ["a"])
    assert_nothing_left(sqlite_registry)


def test_a_discard_counts_for_one_outcome(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """What a veto has rolled back anyway does not refuse what the stream keeps."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        add_and_flush(sqlite_registry())
        sqlite_registry.remove()
        start_response("404 Not Found", [])
        yield b"one"
        environ["wsgi_dbsession.scope"].keep()
        sqlite_registry.add(Note(text="kept"))

    assert ask(SessionMiddleware(app, sqlite_registry, commit_on="headers")).errors == []
    assert sqlite_database.notes() == ["kept"]


def test_what_joins_the_transaction_of_a_listener_is_committed(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """It began that transaction at the rollback of the one before."""

    @event.listens_for(sqlite_registry.session_factory, "after_soft_rollback")
    def on_rollback(session: Session, _: object) -> None:
        if session.is_active:
            read(session)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        session = sqlite_registry()
        add_and_flush(session)
        start_response("404 Not Found", [])
        yield b"one"
        environ["wsgi_dbsession.scope"].keep()
        session.add(Note(text="kept"))

    ask(SessionMiddleware(app, sqlite_registry, commit_on="headers"))

    assert sqlite_database.notes() == ["kept"]


def test_what_a_connection_has_committed_is_not_discarded(
    stocked: tuple[Registry, Database],
) -> None:
    """Nothing was begun since."""
    registry, database = stocked
    with session_scope(registry):
        add_and_flush(registry())
        registry.connection().commit()
        registry.remove()

    assert database.notes() == ["a", "there"]


def test_what_a_statement_has_committed_is_not_discarded(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """The driver of SQLite shows that no transaction is left."""
    with session_scope(sqlite_registry):
        execute(sqlite_registry())
        sqlite_registry.execute(text("COMMIT"))
        sqlite_registry.remove()

    assert sqlite_database.notes() == ["a"]


def test_a_read_may_be_discarded_where_a_connection_was_kept(
    stocked: tuple[Registry, Database],
) -> None:
    """Its pool has it back, so what it had written belongs to another request."""
    registry, _ = stocked
    with session_scope(registry):
        registry.add(Note(text="a"))
        kept = registry.connection().connection

    with session_scope(registry):
        read(registry())
        registry.remove()

    assert not kept.is_valid


def test_an_object_that_is_kept_for_the_stream_is_committed(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """An attribute begins a transaction too."""
    notes: list[Note] = []

    def early() -> None:
        notes.append(Note(text="a"))
        sqlite_registry.add(notes[0])

    def late() -> None:
        notes.pop().text = "b"

    app = BODIES["unsized generator"](Program(early, late))
    drive(SessionMiddleware(app, sqlite_registry, commit_on="headers"))

    assert sqlite_database.notes() == ["b"]
