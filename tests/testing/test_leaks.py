"""What is left open is reported, with its place."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from psycopg.adapt import Dumper
from sqlalchemy import event, func, select, text

from tests.support.models import Base, Database, Note, make_engine
from tests.support.wsgi import make_registry
from tests.testing.applications import Registry, add, notes, problem
from wsgi_dbsession import NoScopeError, SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.testing import isolate, record_outcomes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

pytestmark = pytest.mark.promise("leaks")


def _stream(registry: Registry, *, savepoint: bool = False) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        with registry.begin_nested() if savepoint else contextlib.nullcontext():
            registry.add(Note(text="half"))
            registry.flush()
            yield b"first"
            yield b"second"

    return SessionMiddleware(app, registry)


def test_a_response_that_was_not_closed_is_reported(
    database: Database, registry: Registry
) -> None:
    """With the line of the test that opened it; the next isolation is sound."""
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/stream"}
    told = problem("scope of GET /stream", f"{__file__}:", "in test_a_response")
    with told, isolate(registry) as outcomes:
        response = _stream(registry)(environ, lambda *_: len)
        next(iter(response))
    assert outcomes[0].reason == "incomplete"

    with isolate(registry):
        add(registry, "a")
        response.close()  # type: ignore[attr-defined]
        assert notes(registry) == ["a"]
    assert database.notes() == []


@pytest.mark.filterwarnings("ignore:.*dropped without close:ResourceWarning")
def test_a_response_without_references_is_no_leak(registry: Registry) -> None:
    """Also if it lies in a cycle that waits for the collector."""
    with isolate(registry) as outcomes:
        gc.disable()
        try:
            response: list[Any] = [_stream(registry)({}, lambda *_: len)]
            next(iter(response[0]))
            response.append(response)
            del response
            assert not outcomes[0].ended
        finally:
            gc.enable()
    assert outcomes[0].reason == "incomplete"


@pytest.mark.filterwarnings("ignore:.*dropped without close:ResourceWarning")
@pytest.mark.parametrize("savepoint", [False, True], ids=["plain", "in a savepoint"])
def test_a_response_may_be_collected_in_the_midst_of_a_statement(
    tmp_path: Path, savepoint: bool
) -> None:
    """Its rollback, on the same connection, waits for the end of the statement."""
    engine = make_engine(f"sqlite:///{tmp_path / 'test.db'}")
    registry = make_registry(engine)
    kept: list[Iterable[bytes]] = []

    def collect() -> int:
        kept.clear()
        return len(kept)

    event.listen(
        engine, "connect", lambda driver, _: driver.create_function("collect", 0, collect)
    )
    Base.metadata.create_all(engine)

    with isolate(registry) as outcomes:
        kept.append(_stream(registry, savepoint=savepoint)({}, lambda *_: len))
        next(iter(kept[0]))
        with session_scope(registry):
            assert registry.scalar(select(func.count(Note.id), func.collect())) == 1
            assert outcomes[0].reason == "incomplete"
            assert registry.scalar(select(func.count(Note.id))) == 0
            registry.begin_nested()
            registry.add(Note(text="a"))
        assert notes(registry) == ["a"]
    engine.dispose()


@pytest.mark.filterwarnings("ignore:.*dropped without close:ResourceWarning")
@pytest.mark.parametrize("savepoint", [False, True], ids=["plain", "in a savepoint"])
def test_a_response_may_be_collected_while_psycopg_holds_its_lock(
    postgres_database: Database, savepoint: bool
) -> None:
    """A rollback there and then would wait for the lock for ever."""
    registry = make_registry(postgres_database.engine)
    kept: list[Iterable[bytes]] = []

    class Collects:
        pass

    class CollectsDumper(Dumper):
        oid = 25  # text

        def dump(self, value: Collects) -> bytes:
            kept.clear()
            return b"collected"

    with isolate(registry) as outcomes:
        kept.append(_stream(registry, savepoint=savepoint)({}, lambda *_: len))
        next(iter(kept[0]))
        with session_scope(registry):
            driver: Any = registry.connection().connection.dbapi_connection
            driver.adapters.register_dumper(Collects, CollectsDumper)
            assert registry.scalar(text("SELECT :x"), {"x": Collects()}) == "collected"
            assert outcomes[0].reason == "incomplete"
            assert registry.scalar(select(func.count(Note.id))) == 0


def test_a_response_that_was_read_but_not_closed_is_no_leak(registry: Registry) -> None:
    """Test clients do that; its outcome is known."""
    with isolate(registry) as outcomes:
        response = _stream(registry)({}, lambda *_: len)
        assert list(response) == [b"first", b"second"]
        assert not outcomes[0].ended
    assert outcomes[0].outcome == "commit"
    assert outcomes[0].ended


def test_a_block_that_was_not_left_is_reported(database: Database, registry: Registry) -> None:
    """It is left now, so that the next test has no scope of this one."""
    told = problem("scope of session_scope", f"{__file__}:", "in test_a_block")
    with told, isolate(registry) as outcomes:
        for word in ("outer", "inner"):
            session_scope(registry).__enter__()
            registry.add(Note(text=word))
            registry.flush()
        session_scope(registry).__enter__()  # without a Session
    assert [each.reason for each in outcomes] == ["incomplete", "incomplete", None]
    with pytest.raises(NoScopeError):
        current_scope()
    assert database.notes() == []


def test_a_block_in_a_suspended_generator_is_reported(
    database: Database, registry: Registry
) -> None:
    """It is at work somewhere else, and finds its connection gone when it goes on."""

    def generator() -> Iterator[None]:
        with session_scope(registry):
            registry.add(Note(text="a"))
            registry.flush()
            yield
            registry.execute(select(1))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        inner = generator()
        next(inner)
        yield b""
        yield from (b"" for _ in inner)

    with problem("scope of session_scope", "a transaction was never"), isolate(registry):
        response = iter(SessionMiddleware(app, registry)({}, lambda *_: len))
        next(response)
    with pytest.raises(RuntimeError, match="is over"):
        next(response)
    assert database.notes() == []


@pytest.mark.parametrize("nested", [False, True], ids=["outer isolation", "inner isolation"])
def test_a_session_that_was_not_closed_is_reported(
    database: Database, registry: Registry, nested: bool
) -> None:
    """One that the test made without a scope, with the line that used it."""
    with contextlib.ExitStack() as stack:
        if nested:
            stack.enter_context(isolate(registry))
        told = problem("a transaction was never ended", f"{__file__}:", "in test_a_session")
        with told, isolate(registry):
            session = registry.session_factory()
            session.add(Note(text="a"))
            session.flush()
        for work in (lambda: session.execute(select(1)), session.commit):
            with pytest.raises(RuntimeError, match="is over"):
                work()
        session.close()
        if nested:
            assert notes(registry) == []
    assert database.notes() == []


def test_an_outer_transaction_is_no_leak_of_the_inner_isolation(registry: Registry) -> None:
    """Only what began in the block has to end in it."""
    with isolate(registry), session_scope(registry):
        registry.add(Note(text="a"))
        registry.flush()
        with isolate(registry):
            pass


def test_an_error_of_the_test_comes_before_the_report(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """The leak is most likely its consequence, so it is logged only."""
    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError), isolate(registry):
        session_scope(registry).__enter__()
        raise ZeroDivisionError
    assert "never ended" in caplog.text


def test_a_place_is_named_even_if_only_libraries_were_there(registry: Registry) -> None:
    """A thread whose target is a library's function has no line of the test's."""
    block = session_scope(registry)
    with record_outcomes(registry) as outcomes:
        thread = threading.Thread(target=block.__enter__, name="worker 7")
        thread.start()
        thread.join()
    assert outcomes[0].opened == "worker 7, in a library"
