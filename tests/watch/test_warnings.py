"""A warning about a connection that is held and not used."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Integer, TypeDecorator, func, select, text

from tests.support.wsgi import Server, ask, make_environ
from wsgi_dbsession import SessionMiddleware, session_scope
from wsgi_dbsession.watch import Watch, _guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

SELECT = text("SELECT 1")
WARN_AFTER = 0.02
NAME = "wsgi_dbsession.watch"


@pytest.fixture
def watch(registry: scoped_session[Session], make_watch: Callable[..., Watch]) -> Watch:
    """A watch that warns soon."""
    return make_watch(registry, warn_after=WARN_AFTER)


class Warnings(logging.Handler):
    """Collects the warnings of the guard, and lets a test wait for one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self._arrived = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._arrived:
            self.records.append(record)
            self._arrived.notify_all()

    def wait(self, count: int = 1) -> list[str]:
        """Return the warnings, once there are so many."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.records) >= count, 60)
        return [record.getMessage() for record in self.records]


@pytest.fixture
def warned() -> Iterator[Warnings]:
    """The warnings of the package."""
    handler = Warnings()
    logger = logging.getLogger("wsgi_dbsession")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def guards() -> set[threading.Thread]:
    """Return the threads that look at holders."""
    return {thread for thread in threading.enumerate() if thread.name == NAME}


def a_round(watch: Watch) -> None:
    """Let the guard look twice at what is held."""
    for _ in range(2):
        time.sleep(watch.warn_after or 0)


@pytest.mark.usefixtures("watch")
def test_a_connection_held_without_use_is_warned_of(
    registry: scoped_session[Session], warned: Warnings
) -> None:
    """The warning has the request, both lines, the time and the fix."""
    said: list[str] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        registry.execute(SELECT)
        said.extend(warned.wait())
        start_response("200 OK", [])
        return [b""]

    ask(SessionMiddleware(app, registry), "GET", "/slow")

    (message,) = said
    assert message.startswith("connection held without a statement for 0.")
    assert "GET /slow, first asked for at " in message
    assert " in app, now at " in message
    assert message.endswith("`with current_scope().released():` around the slow call")
    (record,) = warned.records
    assert record.scope == "GET /slow"  # type: ignore[attr-defined]
    assert "test_warnings.py:" in record.line  # type: ignore[attr-defined]
    assert record.seconds > WARN_AFTER  # type: ignore[attr-defined]


def test_a_place_is_warned_of_once(
    registry: scoped_session[Session], watch: Watch, warned: Warnings
) -> None:
    """Another line has a warning of its own."""

    def hold(name: str) -> None:
        with session_scope(registry, name=name):
            registry.execute(SELECT)
            a_round(watch)
            warned.wait()

    hold("first")
    hold("second")
    with session_scope(registry, name="third"):
        registry.execute(SELECT)
        messages = warned.wait(2)

    assert [": first, " in messages[0], ": third, " in messages[1]] == [True, True]


def test_a_stream_is_warned_of_between_its_blocks(
    registry: scoped_session[Session], warned: Warnings, watch: Watch
) -> None:
    """Even if it has run a statement just now; the fix is another one."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        while True:
            registry.execute(SELECT)
            yield b"tick"

    response: Any = SessionMiddleware(app, registry)(make_environ(), Server().start_response)
    next(response)
    while not warned.records:
        next(response)
    response.close()

    (message,) = warned.wait()
    assert message.startswith("connection held by a stream for 0.")
    assert message.endswith(
        'Release it: use commit_on="auto", and `with session_scope(Session):` for each block'
    )


def test_a_stream_is_warned_of_inside_of_a_block(
    registry: scoped_session[Session], warned: Warnings, watch: Watch
) -> None:
    """Where it waits for something after blocks were sent."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"start"
        registry.execute(SELECT)
        warned.wait()
        yield b"end"

    reply = ask(SessionMiddleware(app, registry))

    (message,) = warned.wait()
    assert reply.body == b"startend"
    assert message.startswith("connection held by a stream for 0.")
    assert ", now at " in message


def test_a_leftover_is_warned_of(
    engine: Engine, registry: scoped_session[Session], warned: Warnings, watch: Watch
) -> None:
    """What asked for it outside of the Session has to return it."""
    with session_scope(registry, name="careless"):
        connection = engine.connect()
    (message,) = warned.wait()
    (holder,) = watch.holders()
    connection.close()

    assert holder.state == "left over"
    assert message.startswith("connection held after the end of its scope for 0.")
    assert ": careless, first asked for at " in message
    assert message.endswith("Release it: close the Session or Connection that asked for it")


def test_a_statement_that_runs_is_not_warned_of(
    registry: scoped_session[Session], watch: Watch, warned: Warnings
) -> None:
    """A slow statement has other remedies, and other tools."""
    with session_scope(registry):
        driver: Any = registry.connection().connection.dbapi_connection
        driver.create_function("wait", 0, lambda: a_round(watch))
        registry.execute(select(func.wait()))

    assert warned.records == []


@pytest.mark.parametrize(
    "fetch",
    [
        pytest.param(lambda result: result.all(), id="all rows"),
        pytest.param(list, id="one by one"),
        pytest.param(lambda result: list(result.partitions(2)), id="in parts"),
    ],
)
def test_rows_that_are_fetched_slowly_are_not_warned_of(
    fetch: Callable[[Any], object],
    registry: scoped_session[Session],
    make_watch: Callable[..., Watch],
    warned: Warnings,
) -> None:
    """The database works for each of them, and the time after them counts from the last one."""
    watch = make_watch(registry, warn_after=0.1)
    seen: list[Any] = []

    def wait(number: int) -> int:
        time.sleep(0.06)
        seen.extend(watch.holders())
        return number

    numbers = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 6)"
    with session_scope(registry):
        driver: Any = registry.connection().connection.dbapi_connection
        driver.create_function("wait", 1, wait)
        fetch(registry.execute(text(f"{numbers} SELECT wait(x) FROM n")))
        seen.extend(watch.holders())

    assert warned.records == []
    assert [(each.state, each.idle_s) for each in seen[:-1]] == [("running", 0.0)] * 6
    assert (seen[-1].state, seen[-1].statements) == ("idle", 1)


def test_code_that_a_fetch_calls_for_its_rows_is_warned_of(
    registry: scoped_session[Session], watch: Watch, warned: Warnings
) -> None:
    """The database has sent them by then."""

    class Slow(TypeDecorator[int]):
        impl = Integer
        cache_ok = True

        def process_result_value(self, value: Any, dialect: object) -> Any:
            seen.extend(warned.wait())
            return value

    seen: list[str] = []
    with session_scope(registry):
        registry.execute(text("SELECT 1 AS x").columns(x=Slow())).fetchall()

    (message,) = seen
    assert message.startswith("connection held without a statement for 0.")


def test_without_warn_after_no_thread_starts(
    registry: scoped_session[Session], make_watch: Callable[..., Watch]
) -> None:
    """There is no thread, and nothing is overdue."""
    before = guards()
    watch = make_watch(registry)
    with session_scope(registry):
        registry.execute(SELECT)
        assert [holder.state for holder in watch.holders()] == ["idle"]
        assert guards() <= before  # those of other tests may end


def test_the_thread_ends_when_no_connection_is_held(
    registry: scoped_session[Session], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another one starts with the next connection."""
    monkeypatch.setattr(_guard, "_IDLE_ROUNDS", 1)
    before = guards()
    for _ in range(2):
        with session_scope(registry):
            registry.execute(SELECT)
            registry.execute(SELECT)
            (guard,) = guards() - before
        guard.join(60)
        assert not guards() - before


def test_a_connection_that_comes_as_the_thread_ends_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It found a thread, and did not start another one."""
    monkeypatch.setattr(_guard, "_IDLE_ROUNDS", 1)
    started = threading.Event()
    answers: list[list[Any]] = [[], [object()]]

    class Guard(_guard.Guard):
        def start(self) -> None:
            started.set()

    guard = Guard(0.01, lambda: answers.pop(0))
    guard._run()

    assert started.is_set()
    assert answers == []


def test_the_second_of_two_threads_finds_a_guard() -> None:
    """Both saw that there was none, and one of them was quicker."""

    class Quicker:
        def __enter__(self) -> None:
            guard.pid = os.getpid()

        def __exit__(self, *_: object) -> None:
            pass

    guard = _guard.Guard(60, list)
    guard._lock = Quicker()  # type: ignore[assignment]
    before = threading.active_count()

    guard.start()

    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("warn_after", "error", "message"),
    [
        pytest.param("2", TypeError, "None or a number of seconds, got '2'", id="a string"),
        pytest.param(True, TypeError, "None or a number of seconds, got True", id="a flag"),
        pytest.param(0, ValueError, "positive, got 0. Pass None to never warn", id="zero"),
        pytest.param(-1.5, ValueError, "must be positive, got -1.5", id="negative"),
        pytest.param(math.inf, ValueError, "must be positive, got inf", id="infinite"),
        pytest.param(math.nan, ValueError, "must be positive, got nan", id="no number"),
    ],
)
def test_warn_after_is_a_number_of_seconds(
    warn_after: Any, error: type[Exception], message: str, registry: scoped_session[Session]
) -> None:
    """Anything else is refused when the watch is made, and nothing is watched."""
    with pytest.raises(error, match=re.escape(message)):
        Watch(registry, warn_after=warn_after)
