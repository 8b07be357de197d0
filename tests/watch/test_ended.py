"""What scopes did with their connections, once they have ended."""

from __future__ import annotations

import json
import sqlite3
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import NullPool

from tests.support.wsgi import ask, make_registry
from wsgi_dbsession import SessionMiddleware, session_scope
from wsgi_dbsession.retry import Retry, RetryMiddleware
from wsgi_dbsession.watch import _account

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession.watch import Ended, Watch

SELECT = text("SELECT 1")


def test_an_ended_request_is_recorded(registry: scoped_session[Session], watch: Watch) -> None:
    """Durations, statements, outcome, reason and attempt."""
    records: list[Ended] = []

    @watch.on_end
    def keep(ended: Ended) -> None:
        records.append(ended)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        registry.execute(SELECT)
        registry.execute(text("CREATE TABLE t (x)"))
        start_response("404 Not Found", [])
        return [b""]

    ask(SessionMiddleware(app, registry, observers=[watch]), "GET", "/no\tte")

    (record,) = records
    assert watch.ended() == [record]
    assert (record.name, record.method, record.path) == ("GET /no\\tte", "GET", "/no\\tte")
    assert (record.outcome, record.reason, record.attempt) == ("rollback", "veto", 1)
    assert (record.statements, record.connections, record.wrote) == (2, 1, True)
    assert 0 < record.in_statements_s < record.held_s
    assert record.waited_s > 0
    assert record.line.endswith(" in app")
    assert (datetime.now(timezone.utc) - record.ended).total_seconds() < 60


def test_a_block_is_recorded(registry: scoped_session[Session], watch: Watch) -> None:
    """By its name; several connections are added up, and the last one comes first."""
    with session_scope(registry, name="twice"):
        registry.execute(SELECT)
        registry.commit()
        registry.execute(SELECT)
    with session_scope(registry, name="once"):
        registry.execute(SELECT)

    once, twice = watch.ended()
    assert (once.name, once.connections, once.statements) == ("once", 1, 1)
    assert (twice.name, twice.connections, twice.statements) == ("twice", 2, 2)
    assert (twice.method, twice.path) == (None, None)
    assert (twice.outcome, twice.reason) == ("commit", "complete")


def test_a_scope_without_a_connection_is_left_out(
    registry: scoped_session[Session], watch: Watch
) -> None:
    """There is nothing to say about it."""
    with session_scope(registry):
        pass

    assert (watch.ended(), watch.places()) == ([], [])


def test_retries_are_shown(registry: scoped_session[Session], watch: Watch) -> None:
    """Each attempt is a scope, and says which one it was."""
    attempts: list[int] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        registry.execute(SELECT)
        attempts.append(1)
        if len(attempts) < 3:
            raise Retry
        start_response("200 OK", [])
        return [b""]

    middleware = SessionMiddleware(app, registry)
    ask(RetryMiddleware(middleware, attempts=3, backoff=0), "GET", "/")

    assert [ended.attempt for ended in watch.ended()] == [3, 2, 1]
    assert [ended.outcome for ended in watch.ended()] == ["commit", "rollback", "rollback"]
    assert board_of(watch)["retries"] == 2


def board_of(watch: Watch) -> Any:
    """Return what the board shows, as JSON."""
    reply = ask(watch.board(nothing), "GET", "/_db", **LOCAL)
    return json.loads(reply.body)


LOCAL = {
    "REMOTE_ADDR": "127.0.0.1",
    "HTTP_HOST": "127.0.0.1:8000",
    "HTTP_ACCEPT": "application/json",
}


def nothing(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    start_response("204 No Content", [])
    return []


def test_an_error_in_a_callback_is_logged(
    registry: scoped_session[Session], watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    """It reaches neither the request nor the other callbacks."""
    seen: list[Ended] = []

    @watch.on_end
    def fail(_: Ended) -> None:
        raise RuntimeError("no")

    watch.on_end(seen.append)
    with session_scope(registry):
        registry.execute(SELECT)

    assert len(seen) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("on_end callback failed: <function")
    assert record.exc_info is not None


def test_a_callback_may_use_the_registry(registry: scoped_session[Session], watch: Watch) -> None:
    """Its own scopes are recorded, and it is not called for them."""
    calls: list[str] = []

    def use(name: str) -> None:
        with session_scope(registry, name=name):
            registry.execute(SELECT)

    @watch.on_end
    def store(ended: Ended) -> None:
        calls.append(ended.name)
        use("store")

    @watch.on_end
    def fail(_: Ended) -> None:
        use("fail")
        raise SystemExit

    for name in ("one", "two"):
        with pytest.raises(SystemExit):
            use(name)

    assert calls == ["one", "two"]
    assert [ended.name for ended in watch.ended()] == [
        *("fail", "store", "two"),
        *("fail", "store", "one"),
    ]


def test_the_lines_that_hold_for_the_longest_come_first(
    registry: scoped_session[Session], watch: Watch
) -> None:
    """All scopes that first asked at one line are one place."""

    def hold(name: str, statements: int) -> None:
        with session_scope(registry, name=name):
            for _ in range(statements):
                registry.execute(SELECT)

    def hold_briefly() -> None:
        with session_scope(registry, name="brief"):
            registry.execute(SELECT)

    hold_briefly()
    hold("short", 1)
    hold("long", 300)
    hold("short", 1)

    long, brief = watch.places()
    assert (long.name, long.scopes) == ("long", 3)
    assert long.line.endswith(" in hold")
    assert long.longest_s < long.total_s
    assert (brief.name, brief.scopes, brief.longest_s) == ("brief", 1, brief.total_s)


def test_a_place_whose_time_is_short_makes_room(
    registry: scoped_session[Session], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept does not grow without end."""
    monkeypatch.setattr(_account, "_MOST_SPOTS", 1)
    with session_scope(registry, name="one"):
        registry.execute(SELECT)
    with session_scope(registry, name="two"):
        registry.execute(SELECT)

    assert [place.name for place in watch.places()] == ["two"]


def test_only_the_last_scopes_are_kept(registry: scoped_session[Session], watch: Watch) -> None:
    """A hundred of them."""
    for number in range(101):
        with session_scope(registry, name=str(number)):
            registry.execute(SELECT)

    assert [ended.name for ended in watch.ended()] == [str(each) for each in range(100, 0, -1)]
    assert sum(place.scopes for place in watch.places()) == 101


def test_statements_without_a_scope_do_not_count(engine: Engine, watch: Watch) -> None:
    """A connection of the engine's own has no scope to end."""
    with engine.connect() as connection:
        connection.execute(SELECT)

    assert watch.ended() == []


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda c: c.exec_driver_sql("SELECT 1"), id="execute"),
        pytest.param(
            lambda c: c.exec_driver_sql("INSERT INTO t VALUES (?)", [(1,), (2,)]),
            id="executemany",
        ),
        pytest.param(
            lambda c: c.execution_options(no_parameters=True).exec_driver_sql("SELECT 1"),
            id="no parameters",
        ),
    ],
)
def test_each_way_to_run_a_statement_counts(
    run: Callable[[Any], object], engine: Engine, make_watch: Callable[..., Watch]
) -> None:
    """As one, whatever number of rows it has."""
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    registry = make_registry(engine)
    watch = make_watch(registry)

    with session_scope(registry):
        run(registry.connection())

    assert [ended.statements for ended in watch.ended()] == [1]


def test_a_driver_whose_cursors_name_no_connection_counts(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """The attribute is optional in PEP 249."""

    class Cursor(sqlite3.Cursor):
        @property
        def connection(self) -> Any:
            raise AttributeError("connection")

    class Connection(sqlite3.Connection):
        def cursor(self, *_: Any) -> Any:
            return super().cursor(Cursor)

    registry = make_registry(make_engine(connect_args={"factory": Connection}))
    watch = make_watch(registry)

    with session_scope(registry):
        registry.execute(SELECT)

    assert [ended.statements for ended in watch.ended()] == [1]


def test_a_statement_that_fails_counts(registry: scoped_session[Session], watch: Watch) -> None:
    """And leaves the holder idle."""
    with session_scope(registry):
        with pytest.raises(Exception, match="syntax error"):
            registry.execute(text("SELEKT"))
        (holder,) = watch.holders()

        assert (holder.state, holder.statements, holder.wrote) == ("idle", 1, None)


def test_a_statement_of_a_connection_without_an_account_is_passed_on(
    engine: Engine, watch: Watch
) -> None:
    """A connection that was detached is the application's."""
    with engine.connect() as connection:
        connection.detach()
        assert watch.holders() == []
        connection.execute(SELECT)
        cursor = connection.connection.dbapi_connection.cursor()  # type: ignore[union-attr]
        engine.dialect.do_execute(cursor, "SELECT 1", ())  # as SQLAlchemy does in a ping
        cursor.close()

    assert watch.holders() == []


def test_a_listener_may_return_the_connection(
    engine: Engine, registry: scoped_session[Session], watch: Watch
) -> None:
    """A connection that is invalidated leaves its holder at once."""
    with session_scope(registry):
        registry.execute(SELECT)
        registry.connection().invalidate()
        assert watch.holders() == []
        registry.rollback()
        event.listen(engine, "before_cursor_execute", lambda *_: None)
        registry.execute(SELECT)

    assert [ended.connections for ended in watch.ended()] == [2]


def test_connections_of_one_scope_are_added_up(
    engine: Engine, registry: scoped_session[Session], watch: Watch
) -> None:
    """Several at once, one after the other, and a wait that timed out."""
    with session_scope(registry):
        with engine.connect() as first, engine.connect() as second:
            first.execute(SELECT)
            second.execute(text("CREATE TABLE t (x)"))
            assert [holder.statements for holder in watch.holders()] == [1, 1]
            with pytest.raises(PoolTimeoutError):
                engine.connect()
        for _ in range(2):
            with engine.connect() as third:
                third.execute(SELECT)

    (ended,) = watch.ended()
    assert (ended.connections, ended.statements, ended.wrote) == (4, 4, True)
    assert ended.waited_s >= 0.05
    assert 0 < ended.in_statements_s < ended.held_s


def test_a_connect_that_fails_counts_as_waiting(make_watch: Callable[..., Watch]) -> None:
    """Even if the scope gets no connection at all, or gets one afterwards."""
    failures = [OSError("no route"), KeyboardInterrupt()]

    def connect() -> sqlite3.Connection:
        time.sleep(0.05)
        if failures:
            raise failures.pop(0)
        return sqlite3.connect(":memory:")

    registry = make_registry(create_engine("sqlite://", creator=connect, poolclass=NullPool))
    watch = make_watch(registry)
    with pytest.raises(OSError, match="no route"), session_scope(registry, name="none"):
        registry.execute(SELECT)
    with session_scope(registry, name="late"):
        with pytest.raises(KeyboardInterrupt):
            registry.execute(SELECT)
        registry.rollback()
        registry.execute(SELECT)

    late, none = watch.ended()
    assert (none.name, none.connections, none.outcome) == ("none", 0, "rollback")
    assert none.waited_s >= 0.05
    assert late.waited_s >= 0.1
    assert (late.name, late.connections, late.statements) == ("late", 1, 1)


def test_a_connection_that_is_returned_late_changes_no_record(
    engine: Engine, registry: scoped_session[Session], watch: Watch
) -> None:
    """What has ended is read while others go on."""
    with session_scope(registry):
        registry.execute(SELECT)
        late = engine.connect()
    (ended,) = watch.ended()
    late.execute(SELECT)
    late.close()

    assert watch.ended() == [ended]
    assert (ended.connections, ended.statements) == (1, 1)
