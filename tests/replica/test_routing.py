"""Which engine a transaction uses, and that its connection is always given back."""

from __future__ import annotations

import gc
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Connection, create_engine, select, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.replica.tables import Note, empty_tables
from tests.support.wsgi import ask, make_environ
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.replica import read_only_engine, session_class
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine

    Keep = Callable[[Engine], Engine]


@pytest.fixture
def engine(tmp_path: Path, keep: Keep) -> Engine:
    """The primary: a SQLite file."""
    made = keep(create_engine(f"sqlite:///{tmp_path / 'test.db'}"))
    empty_tables(made.url)
    return made


@pytest.fixture
def reads(engine: Engine, keep: Keep) -> Engine:
    return keep(read_only_engine(engine))


@pytest.fixture
def registry(engine: Engine, reads: Engine) -> scoped_session[Session]:
    return make_registry(session_class(engine, reads))


def make_registry(kind: type[Session], **options: Any) -> scoped_session[Session]:
    return scoped_session(sessionmaker(class_=kind, **options), scopefunc=current_scope)


def notes(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(select(Note.text).order_by(Note.id)))


def application(registry: scoped_session[Session], view: Callable[[], object]) -> WSGIApplication:
    """Return an application whose body is what a function returns."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body = repr(view()).encode()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [body]

    return SessionMiddleware(app, registry)


def route(registry: scoped_session[Session], engine: Engine, reads: Engine) -> str:
    """Return which engine a registry's Session is on."""
    registry.execute(text("SELECT 1"))
    used = registry.connection().engine
    assert used is engine or used is reads
    return "primary" if used is engine else "reads"


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("GET", "reads"),
        ("HEAD", "reads"),
        ("POST", "primary"),
        ("PUT", "primary"),
        ("DELETE", "primary"),
        ("OPTIONS", "primary"),
    ],
)
def test_the_method_decides(
    method: str, where: str, registry: scoped_session[Session], engine: Engine, reads: Engine
) -> None:
    """GET and HEAD read; everything else may write."""
    found: list[str] = []
    app = application(registry, lambda: found.append(route(registry, engine, reads)))

    assert ask(app, method).errors == []

    assert found == [where]


def test_a_callable_decides(engine: Engine, reads: Engine) -> None:
    """A search by POST reads, a GET that counts visits does not."""
    registry = make_registry(
        session_class(engine, reads, when=lambda environ: environ["PATH_INFO"] == "/search")
    )
    app = application(registry, lambda: route(registry, engine, reads))

    assert ask(app, "POST", "/search").body == b"'reads'"
    assert ask(app, "GET", "/visit").body == b"'primary'"


@pytest.mark.parametrize(
    ("method", "read_only", "where"), [("GET", False, "primary"), ("POST", True, "reads")]
)
def test_the_scope_may_be_pinned(
    method: str,
    read_only: bool,
    where: str,
    registry: scoped_session[Session],
    engine: Engine,
    reads: Engine,
) -> None:
    """What the application says of its scope counts more than the method."""

    def view() -> str:
        current_scope().read_only = read_only
        return route(registry, engine, reads)

    assert ask(application(registry, view), method).body == repr(where).encode()


@pytest.mark.parametrize(
    ("read_only", "where"), [(None, "primary"), (False, "primary"), (True, "reads")]
)
def test_a_block_reads_where_it_says_so(
    read_only: bool | None,
    where: str,
    registry: scoped_session[Session],
    engine: Engine,
    reads: Engine,
) -> None:
    """Outside of requests, in a decorated function, and in a request that reads."""
    with session_scope(registry, read_only=read_only):
        assert route(registry, engine, reads) == where

    @session_scope(registry, read_only=read_only)
    def job() -> str:
        return route(registry, engine, reads)

    assert job() == where

    def view() -> tuple[str, str]:
        with session_scope(registry, read_only=read_only):
            inner = route(registry, engine, reads)
        return inner, route(registry, engine, reads)

    assert ask(application(registry, view)).body == repr((where, "reads")).encode()


def test_without_a_scope_the_primary_is_used(
    registry: scoped_session[Session], engine: Engine
) -> None:
    """A Session that is made by hand belongs to no scope."""
    with registry.session_factory() as session:
        assert session.get_bind() is session.get_bind() is engine
        session.execute(text("SELECT 1"))
        assert session.connection().engine is engine


def test_a_further_attempt_uses_the_primary(
    registry: scoped_session[Session], engine: Engine, reads: Engine
) -> None:
    """A retried request may write; a block that only reads may not."""

    def view() -> tuple[str, str]:
        with session_scope(registry, read_only=True):
            inner = route(registry, engine, reads)
        return inner, route(registry, engine, reads)

    def attempt(number: int) -> dict[str, Any]:
        return {"wsgi_dbsession.attempt": number}

    app = application(registry, view)

    assert ask(app, **attempt(1)).body == b"('reads', 'reads')"
    assert ask(app, **attempt(2)).body == b"('reads', 'primary')"


# -- a write that is refused ----------------------------------------------------------------------


def add_note(registry: scoped_session[Session]) -> None:
    registry.add(Note(text="x"))


def insert_note(registry: scoped_session[Session]) -> None:
    registry.execute(text("INSERT INTO note (text) VALUES ('x')"))


@pytest.mark.parametrize("write", [add_note, insert_note])
def test_a_write_fails_with_a_note(
    write: Callable[[scoped_session[Session]], None],
    registry: scoped_session[Session],
    engine: Engine,
) -> None:
    """By the ORM it fails in the flush, by SQL at once: no client gets a success."""
    reply = ask(application(registry, lambda: write(registry)))

    (error,) = reply.errors
    assert isinstance(error, DBAPIError)
    assert "current_scope().read_only = False" in "".join(getattr(error, "__notes__", ()))
    assert reply.status.startswith("500")
    assert notes(engine) == []


def swallow(registry: scoped_session[Session], then: Callable[[], object]) -> Callable[[], None]:
    def view() -> None:
        with pytest.raises(DBAPIError):
            insert_note(registry)
        then()

    return view


def test_a_refused_write_is_not_forgotten(
    registry: scoped_session[Session], engine: Engine
) -> None:
    """An application that catches the error and calls it a success is contradicted.

    There is no transaction that the database could have aborted.
    """
    reply = ask(application(registry, swallow(registry, lambda: None)))

    (error,) = reply.errors
    assert isinstance(error, PendingRollbackError)
    assert isinstance(error.__cause__, DBAPIError)
    assert reply.status.startswith("500")


@pytest.mark.parametrize("end", ["remove", "close"])
def test_a_refused_write_is_not_discarded(
    end: str, registry: scoped_session[Session], engine: Engine
) -> None:
    """Closing the Session does not hide it either."""
    reply = ask(application(registry, swallow(registry, getattr(registry, end))))

    (error,) = reply.errors
    assert "a Session was closed at" in str(error)
    assert reply.status.startswith("500")


def test_a_refused_write_may_be_rolled_back(registry: scoped_session[Session]) -> None:
    """The application that says so has dealt with it, and reads on."""

    def view() -> None:
        swallow(registry, registry.rollback)()
        registry.scalars(select(Note)).all()

    reply = ask(application(registry, view))

    assert reply.errors == []
    assert reply.status == "200 OK"


# -- one connection for a transaction -------------------------------------------------------------


def test_a_transaction_stays_where_it_began(
    registry: scoped_session[Session], engine: Engine, reads: Engine
) -> None:
    """A scope that is pinned too late is pinned for the next transaction."""

    def view() -> list[str]:
        found = [route(registry, engine, reads)]
        current_scope().read_only = False
        found.append(route(registry, engine, reads))
        registry.commit()
        found.append(route(registry, engine, reads))
        insert_note(registry)
        return found

    reply = ask(application(registry, view))

    assert reply.body == repr(["reads", "reads", "primary"]).encode()
    assert notes(engine) == ["x"]


@pytest.mark.parametrize("end", ["commit", "rollback", "close", "reset", "invalidate"])
def test_whatever_ends_a_transaction_gives_the_connection_back(
    end: str, registry: scoped_session[Session], reads: Engine
) -> None:
    """The pool has it again before the scope is over."""
    pool: Any = reads.pool
    if not hasattr(Session, end):
        pytest.skip(f"this SQLAlchemy has no Session.{end}()")
    with session_scope(registry, read_only=True):
        registry.execute(text("SELECT 1"))
        assert pool.checkedout() == 1
        getattr(registry(), end)()
        assert pool.checkedout() == 0
        registry.execute(text("SELECT 1"))
        assert pool.checkedout() == 1
    assert pool.checkedout() == 0


@pytest.mark.parametrize("end", ["close", "reset", "invalidate"])
def test_a_transaction_that_did_not_begin_keeps_nothing(
    end: str, registry: scoped_session[Session], reads: Engine
) -> None:
    """To ask for the bind is enough to choose a connection."""
    pool: Any = reads.pool
    if not hasattr(Session, end):
        pytest.skip(f"this SQLAlchemy has no Session.{end}()")
    with session_scope(registry, read_only=True):
        assert registry.get_bind() is registry.get_bind()
        assert pool.checkedout() == 1
        getattr(registry(), end)()
        assert pool.checkedout() == 0
        registry.get_bind()
    assert pool.checkedout() == 0


def test_a_bind_that_was_asked_for_too_early_does_not_count(
    registry: scoped_session[Session], engine: Engine, reads: Engine
) -> None:
    """It is chosen again where the scope was pinned meanwhile."""
    pool: Any = reads.pool
    with session_scope(registry, read_only=True) as scope:
        registry.get_bind()
        scope.read_only = False
        assert registry.get_bind() is engine
        assert pool.checkedout() == 0
        insert_note(registry)
    assert notes(engine) == ["x"]


def test_a_session_that_outlives_its_scope_chooses_again(
    registry: scoped_session[Session], engine: Engine, reads: Engine
) -> None:
    """A bind that was chosen for one scope is not used in another."""
    session = registry.session_factory()
    with session_scope(registry, read_only=True):
        session.get_bind()
    with session_scope(registry):
        assert session.get_bind() is engine
    with session_scope(registry, read_only=True):
        first = session.get_bind()
    with session_scope(registry, read_only=True):
        second = session.get_bind()
    assert isinstance(first, Connection)
    assert first is not second
    assert first.closed
    session.close()


def test_an_explicit_transaction_is_routed(
    registry: scoped_session[Session], reads: Engine
) -> None:
    """``Session.begin()`` comes before the first question for a bind."""
    with session_scope(registry, read_only=True), registry.begin():
        assert registry.connection().engine is reads


def test_what_reads_after_the_outcome_is_routed_too(
    registry: scoped_session[Session], engine: Engine, reads: Engine
) -> None:
    """A stream that reads on begins another transaction."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield route(registry, engine, reads).encode()
        yield route(registry, engine, reads).encode()

    reply = ask(SessionMiddleware(app, registry, commit_on="headers"))

    assert reply.body == b"readsreads"


def test_an_abandoned_response_gives_the_connection_back(
    registry: scoped_session[Session], reads: Engine
) -> None:
    """A server that forgets ``close()`` leaks nothing."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        registry.execute(text("SELECT 1"))
        yield b"1"
        yield b"2"

    response = SessionMiddleware(app, registry)(make_environ(), lambda *_: lambda _: None)
    next(iter(response))
    pool: Any = reads.pool
    assert pool.checkedout() == 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del response
        gc.collect()

    assert pool.checkedout() == 0


# -- other binds ----------------------------------------------------------------------------------


def test_other_binds_keep_their_meaning(
    engine: Engine, reads: Engine, tmp_path: Path, keep: Keep
) -> None:
    """Only what would go to the primary is routed."""
    other = keep(create_engine(f"sqlite:///{tmp_path / 'other.db'}"))
    empty_tables(other.url)
    registry = make_registry(session_class(engine, reads), binds={Note: other})

    with session_scope(registry, read_only=True):
        registry.add(Note(text="x"))
        assert registry.connection().engine is reads
        registry.execute(
            text("INSERT INTO note (text) VALUES ('y')"), bind_arguments={"bind": engine}
        )

    assert notes(other) == ["x"]
    assert notes(engine) == ["y"]


def test_a_session_with_a_bind_of_its_own_is_not_routed(
    engine: Engine, reads: Engine, tmp_path: Path, keep: Keep
) -> None:
    """A connection, say, in the tests of an application."""
    kind = session_class(engine, reads)
    with engine.connect() as connection:
        registry = make_registry(kind, bind=connection)
        with session_scope(registry, read_only=True):
            assert registry.connection() is connection
    registry = make_registry(kind, bind=engine)
    with session_scope(registry, read_only=True):
        assert registry.connection().engine is reads


def test_a_two_phase_session_is_not_routed(engine: Engine, reads: Engine) -> None:
    """A connection at AUTOCOMMIT cannot prepare a transaction."""
    registry = make_registry(session_class(engine, reads), twophase=True)

    with session_scope(registry, read_only=True):
        assert registry.get_bind() is engine


def test_the_class_may_be_derived_from(engine: Engine, reads: Engine) -> None:
    """An application that has a Session class of its own keeps it."""

    class MySession(session_class(engine, reads)):  # type: ignore[misc]
        def mine(self) -> str:
            return "mine"

    registry = make_registry(MySession)

    with session_scope(registry, read_only=True):
        assert registry().mine() == "mine"  # type: ignore[attr-defined]
        assert registry.connection().engine is reads


def test_an_isolated_test_reads_what_it_has_written(
    registry: scoped_session[Session], engine: Engine
) -> None:
    """Its transaction is on one connection, which sees what no other one does."""
    app = application(registry, lambda: registry.scalars(select(Note.text)).all())

    with isolate(registry):
        with session_scope(registry):
            add_note(registry)
        assert ask(app).body == b"['x']"

    assert notes(engine) == []


# -- arguments ------------------------------------------------------------------------------------


def test_an_engine_that_writes_is_refused(engine: Engine) -> None:
    """What looks like a read would write."""
    with pytest.raises(ValueError, match="reads must be made by read_only_engine"):
        session_class(engine, engine)


def test_when_is_a_callable(engine: Engine, reads: Engine) -> None:
    """It is found when the class is made."""
    with pytest.raises(TypeError, match=r"when must be callable, got \('GET',\)"):
        session_class(engine, reads, when=("GET",))  # type: ignore[arg-type]


def test_read_only_needs_sessions_that_route(engine: Engine) -> None:
    """A block that nothing makes read-only would write."""
    plain = scoped_session(sessionmaker(engine), scopefunc=current_scope)

    with pytest.raises(ValueError, match="read_only must be False for Session, got True"):
        session_scope(plain, read_only=True)
