"""A pool that times out: who holds its connections, in the error and in the log."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import QueuePool, create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from tests.support.wsgi import ask, make_registry
from wsgi_dbsession import SessionMiddleware, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession.watch import Watch

SELECT = text("SELECT 1")


def notes(error: BaseException) -> str:
    found: list[str] = getattr(error, "__notes__", [])
    return "\n".join(found)


def test_a_time_out_names_the_holders(
    registry: scoped_session[Session], watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each with its request and its line, in a note and in one line of the log."""
    ready, go_on = threading.Barrier(3), threading.Event()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        registry.execute(SELECT)
        if environ["PATH_INFO"] != "/third":
            ready.wait(60)
            go_on.wait(60)
        start_response("200 OK", [])
        return [b""]

    served = SessionMiddleware(app, registry, observers=[watch])
    threads = [
        threading.Thread(target=ask, args=(served, "GET", path)) for path in ("/first", "/second")
    ]
    for thread in threads:
        thread.start()
    ready.wait(60)
    reply = ask(served, "POST", "/third")
    go_on.set()
    for thread in threads:
        thread.join()

    (error,) = reply.errors
    assert isinstance(error, PoolTimeoutError)
    (record,) = [each for each in caplog.records if each.levelname == "ERROR"]
    for said in (notes(error), record.getMessage()):
        assert "GET /first, held for " in said
        assert "GET /second, held for " in said
        assert said.count("test_exhausted.py:") >= 4  # where they asked, and where they are
        assert said.count(" in app") >= 4
    assert record.getMessage().startswith("pool exhausted: POST /third waited 0.")
    assert "\n" not in record.getMessage()
    assert record.scope == "POST /third"  # type: ignore[attr-defined]
    assert "test_exhausted.py:" in record.line  # type: ignore[attr-defined]
    assert len(record.holders) == 2  # type: ignore[attr-defined]
    assert watch.pools()[0].timeouts == 1
    (ended,) = [each for each in watch.ended() if each.name == "POST /third"]
    assert (ended.connections, ended.outcome) == (0, "rollback")
    assert ended.waited_s >= 0.05
    assert watch.waiting() == []


def test_who_waits_is_shown_meanwhile(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """The longest wait comes first."""
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=60)
    registry = make_registry(engine)
    watch = make_watch(registry)

    def wait(name: str) -> None:
        with session_scope(registry, name=name):
            registry.execute(SELECT)

    names = ["one", "two"]
    threads = [threading.Thread(target=wait, args=(name,), name=name) for name in names]
    with session_scope(registry):
        registry.execute(SELECT)
        for number, thread in enumerate(threads):
            thread.start()
            while len(watch.waiting()) <= number:
                thread.join(0.01)
        waiting, (use,) = watch.waiting(), watch.pools()
    for thread in threads:
        thread.join()

    assert [each.name for each in waiting] == [each.thread for each in waiting] == names
    assert waiting[0].waited_s > waiting[1].waited_s > 0
    assert waiting[0].line.endswith(" in wait")
    assert waiting[0].pool == use.name
    assert use.waiting == 2
    assert watch.waiting() == []


def test_many_holders_are_counted(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """An error of fifty names is long enough."""
    engine = make_engine(pool_size=52, max_overflow=0, pool_timeout=0.01)
    registry = make_registry(engine)
    make_watch(registry)

    with ExitStack() as stack:
        for _ in range(52):
            stack.enter_context(engine.connect())
        with pytest.raises(PoolTimeoutError) as caught:
            engine.connect()

    assert notes(caught.value).endswith("\n  and 2 more")
    assert notes(caught.value).count("outside of a scope, held") == 50


def test_holders_of_before_are_unknown(
    engine: Engine, registry: scoped_session[Session], make_watch: Callable[..., Watch]
) -> None:
    """The watch says that it does not know them."""
    with engine.connect(), engine.connect():
        make_watch(registry)
        with pytest.raises(PoolTimeoutError) as caught:
            engine.connect()

    assert "unknown holders, which asked before the watch began" in notes(caught.value)


def test_holders_of_another_pool_are_not_named(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """Only who holds a connection of this pool can be its reason."""
    engine, other = make_engine(), make_engine()
    make_watch(make_registry(engine), make_registry(other))

    with (
        other.connect(),
        engine.connect(),
        engine.connect(),
        pytest.raises(PoolTimeoutError) as caught,
    ):
        engine.connect()

    assert notes(caught.value).count("outside of a scope") == 2


def test_another_error_of_the_pool_says_nothing(
    make_watch: Callable[..., Watch], caplog: pytest.LogCaptureFixture
) -> None:
    """A database that does not answer has no holders."""
    engine = create_engine("sqlite:////nowhere/at/all.db", poolclass=QueuePool)
    watch = make_watch(make_registry(engine))

    with pytest.raises(Exception, match="unable to open") as caught:
        engine.connect()

    assert notes(caught.value) == ""
    assert caplog.records == []
    assert (watch.waiting(), watch.holders()) == ([], [])
