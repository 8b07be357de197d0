"""Who holds a connection right now."""

from __future__ import annotations

import gc
import inspect
import sqlite3
import sys
import threading
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select, text

from tests.support.wsgi import Server, ask, make_environ, make_registry
from wsgi_dbsession import SessionMiddleware, session_scope
from wsgi_dbsession.watch._holder import backend_pid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession.watch import Watch

SELECT = text("SELECT 1")


def here(_: object) -> str:
    """Return the caller's line, as a watch writes it."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    code = frame.f_back.f_code
    return f"{code.co_filename}:{frame.f_back.f_lineno} in {code.co_name}"


def test_a_request_that_has_asked_is_a_holder(
    registry: scoped_session[Session], watch: Watch
) -> None:
    """Method, path, line, statements and thread are there; afterwards, no holder is left."""
    seen: list[Any] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        assert watch.holders() == []
        seen.append(here(registry.execute(SELECT)))
        registry.execute(SELECT)
        seen.extend(watch.holders())
        start_response("200 OK", [])
        return [b"x"]

    ask(SessionMiddleware(app, registry, observers=[watch]), "GET", "/no\ntes")

    line, holder = seen
    assert holder.name == "GET /no\\ntes"
    assert (holder.method, holder.path) == ("GET", "/no\\ntes")
    assert holder.line == line
    assert holder.now is not None
    assert holder.now.startswith("at ")
    assert holder.now.endswith(" in app")
    assert holder.state == "idle"
    assert holder.statements == 2
    assert holder.wrote is False
    assert holder.thread == threading.current_thread().name
    assert holder.pool == watch.pools()[0].name
    assert holder.backend_pid is None
    assert datetime.now(timezone.utc) - holder.since < timedelta(seconds=60)
    assert 0 <= holder.idle_s <= holder.held_s
    assert 0 < holder.idle_share <= 1
    assert watch.holders() == []


def test_a_block_is_a_holder_by_its_name(registry: scoped_session[Session], watch: Watch) -> None:
    """The longest holder comes first."""
    with session_scope(registry, name="nightly"):
        registry.execute(SELECT)
        with session_scope(registry, name="inner"):
            registry.execute(SELECT)
            holders = watch.holders()

    assert [holder.name for holder in holders] == ["nightly", "inner"]
    assert (holders[0].method, holders[0].path) == (None, None)
    assert holders[0].held_s > holders[1].held_s


def test_a_connection_outside_of_a_scope_has_a_holder(engine: Engine, watch: Watch) -> None:
    """The pool counts it too, so it is shown."""
    with engine.connect() as connection:
        connection.execute(SELECT)
        (holder,) = watch.holders()

    assert holder.name == "outside of a scope"
    assert (holder.method, holder.path) == (None, None)
    assert holder.line.endswith("in test_a_connection_outside_of_a_scope_has_a_holder")
    assert watch.holders() == []


@pytest.mark.parametrize(
    ("statements", "wrote"),
    [
        pytest.param(["SELECT 1"], False, id="a SELECT does not write"),
        pytest.param(["SELECT 1", "CREATE TABLE t (x)"], True, id="a CREATE does"),
        pytest.param(["ANALYZE"], None, id="of an ANALYZE it is unknown"),
        pytest.param(["ANALYZE", "CREATE TABLE t (x)", "ANALYZE"], True, id="one is enough"),
    ],
)
def test_a_holder_has_written_or_not(
    statements: list[str],
    wrote: bool | None,
    registry: scoped_session[Session],
    watch: Watch,
) -> None:
    """It is read from the words of its statements."""
    with session_scope(registry):
        for each in statements:
            registry.execute(text(each))
        assert [holder.wrote for holder in watch.holders()] == [wrote]

    assert [ended.wrote for ended in watch.ended()] == [wrote]


def test_a_holder_in_a_statement_runs(registry: scoped_session[Session], watch: Watch) -> None:
    """While the database works, the holder is not idle."""
    seen: list[Any] = []
    with session_scope(registry):
        driver: Any = registry.connection().connection.dbapi_connection
        driver.create_function("look", 0, lambda: seen.extend(watch.holders()))
        registry.execute(select(func.look()))

    (holder,) = seen
    assert holder.state == "running"
    assert holder.idle_s == 0
    assert holder.statements == 0


def test_a_commit_is_no_idleness(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """A holder that has been idle for too long is not overdue while it commits."""
    seen: list[Any] = []

    class Connection(sqlite3.Connection):
        def commit(self) -> None:
            seen.extend(watch.holders())
            super().commit()

    registry = make_registry(make_engine(connect_args={"factory": Connection}))
    watch = make_watch(registry, warn_after=1e-9)
    with session_scope(registry):
        registry.execute(SELECT)
        seen.extend(watch.holders())

    assert [holder.state for holder in seen] == ["overdue", "running"]


def test_a_stream_waits_between_two_blocks(
    registry: scoped_session[Session], watch: Watch
) -> None:
    """Its thread does something else meanwhile."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.execute(SELECT)
        yield b"one"
        yield b"two"

    response: Any = SessionMiddleware(app, registry)(make_environ(), Server().start_response)
    assert next(response) == b"one"
    (holder,) = watch.holders()
    response.close()

    assert holder.now == "between two blocks of the response"
    assert holder.name == "GET /"
    assert watch.holders() == []


def test_what_a_scope_leaves_behind_is_left_over(
    engine: Engine, registry: scoped_session[Session], watch: Watch
) -> None:
    """A connection that outlives its scope is shown with the scope's name."""
    with session_scope(registry, name="careless"):
        connection = engine.connect()
        connection.execute(SELECT)
    (holder,), (ended,) = watch.holders(), watch.ended()
    connection.execute(SELECT)
    connection.close()

    assert holder.name == "careless"
    assert holder.state == "left over"
    assert holder.now is None
    assert watch.holders() == []
    # The account of the scope was closed before.
    assert (ended.connections, ended.statements) == (1, 1)
    assert ended.held_s > 0
    assert watch.ended() == [ended]
    assert [place.total_s for place in watch.places()] == [ended.held_s]


def test_a_scope_that_was_dropped_keeps_no_holder(
    registry: scoped_session[Session], watch: Watch
) -> None:
    """The watch does not keep a response alive that the server has forgotten."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.execute(SELECT)
        yield b"one"

    response: Any = SessionMiddleware(app, registry)(make_environ(), Server().start_response)
    assert next(response) == b"one"
    assert len(watch.holders()) == 1

    del response
    with pytest.warns(ResourceWarning, match="dropped without close"):
        gc.collect()

    assert watch.holders() == []


def test_a_connection_of_a_scope_that_was_dropped_has_no_name(
    engine: Engine, registry: scoped_session[Session], watch: Watch
) -> None:
    """Its scope is gone, and its name with it, but not the connection."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.execute(SELECT)
        connections.append(engine.connect())
        yield b"one"

    connections: list[Any] = []
    response: Any = SessionMiddleware(app, registry)(make_environ(), Server().start_response)
    next(response)
    del response
    with pytest.warns(ResourceWarning, match="dropped without close"):
        gc.collect()
    (holder,) = watch.holders()
    connections.pop().close()

    assert holder.name == "a scope that was dropped"
    assert holder.state == "left over"


def test_the_thread_that_asked_may_be_gone(engine: Engine, watch: Watch) -> None:
    """Then its number is shown, and no line that it is at."""
    found: list[Any] = []

    def connect() -> None:
        found.append(engine.connect())

    thread = threading.Thread(target=connect)
    thread.start()
    thread.join()
    (holder,) = watch.holders()
    found.pop().close()

    assert holder.thread == f"thread {thread.ident}"
    assert holder.now is None


def test_postgresql_tells_the_backend(
    postgres_registry: scoped_session[Session], make_watch: Callable[..., Watch]
) -> None:
    """It is the number in pg_stat_activity."""
    watch = make_watch(postgres_registry)
    with session_scope(postgres_registry):
        pid = postgres_registry.scalar(text("SELECT pg_backend_pid()"))
        (holder,) = watch.holders()

    assert holder.backend_pid == pid


@pytest.mark.parametrize(
    ("connection", "pid"),
    [
        pytest.param(SimpleNamespace(info=SimpleNamespace(backend_pid=7)), 7, id="psycopg"),
        pytest.param(SimpleNamespace(connection_id=8), 8, id="mysql-connector"),
        pytest.param(SimpleNamespace(thread_id=lambda: 9), 9, id="PyMySQL"),
        pytest.param(SimpleNamespace(thread_id=lambda: "9"), None, id="no number"),
        pytest.param(object(), None, id="a driver that does not know"),
    ],
)
def test_drivers_know_the_backend_in_different_ways(connection: object, pid: int | None) -> None:
    """Nothing is sent to find it out."""
    assert backend_pid(connection) == pid


def test_a_free_threaded_interpreter_shows_no_frames(
    registry: scoped_session[Session], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, the frames of another thread change while they are read."""
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with session_scope(registry):
        registry.execute(SELECT)
        (holder,) = watch.holders()

    assert holder.now is None
    assert "test_holders.py" in holder.line
