"""Threads and processes in an isolation."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.pool import StaticPool

from tests.support.models import Base, Database, Note
from tests.support.wsgi import make_registry
from tests.testing.applications import Registry, add, make_app, notes, request
from wsgi_dbsession import SessionMiddleware, session_scope
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def run_in_thread(work: Callable[[], object]) -> list[BaseException]:
    """Run it in another thread, and return the error if there was one."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return errors


def test_a_request_in_another_thread_is_isolated(database: Database, registry: Registry) -> None:
    """A live server's thread works on the same connection."""
    app = make_app(lambda: registry.add(Note(text="a")), registry)
    with isolate(registry) as outcomes:
        assert run_in_thread(lambda: request(app)) == []
        assert notes(registry) == ["a"]
        assert outcomes[0].name == "POST /work"
    assert database.notes() == []


def test_transactions_of_several_threads_take_turns(
    database: Database, registry: Registry
) -> None:
    """Each waits for the others, so that each commits and rolls back its own."""

    def work(number: int) -> None:
        for each in range(10):
            with session_scope(registry) as scope:
                registry.add(Note(text=f"{number}"))
                registry.flush()
                if each % 2:
                    scope.doom()

    with isolate(registry, wait=60):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(notes(registry)) == sorted("0123" * 5)
    assert database.notes() == []


def test_a_thread_that_waits_in_vain_says_for_what(registry: Registry) -> None:
    """The usual reason is a transaction that the test itself holds open."""
    with isolate(registry, wait=0.05):
        with session_scope(registry):
            registry.add(Note(text="held"))
            registry.flush()
            (error,) = run_in_thread(lambda: notes(registry))
            assert isinstance(error, RuntimeError)
            assert f"begun at {__file__}:" in str(error)
            assert "take turns" in str(error)
        assert notes(registry) == ["held"]


def test_the_steps_of_a_response_may_move_between_threads(registry: Registry) -> None:
    """Who used a transaction last is whose it is."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.add(Note(text="a"))
        registry.flush()
        yield b"first"
        registry.add(Note(text="b"))
        registry.flush()
        yield b"second"
        assert len(registry.scalars(select(Note)).all()) == 2

    with isolate(registry, wait=0.05):
        response = iter(SessionMiddleware(app, registry)({}, lambda *_: len))
        assert next(response) == b"first"
        assert run_in_thread(lambda: next(response)) == []
        with pytest.raises(RuntimeError, match="take turns"):
            notes(registry)
        assert list(response) == []
        assert notes(registry) == ["a", "b"]


@pytest.mark.parametrize("shared", [True, False], ids=["one database", "one for each thread"])
def test_in_memory_sqlite_is_shared_by_threads_or_says_how(shared: bool) -> None:
    """SQLAlchemy's default gives each thread an empty database of its own."""
    engine = (
        create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        if shared
        else create_engine("sqlite://")
    )
    Base.metadata.create_all(engine)
    registry = make_registry(engine)
    with isolate(registry):
        errors = run_in_thread(lambda: add(registry, "a"))
        if shared:
            assert errors == []
        else:
            assert "poolclass=StaticPool" in str(errors[0])
        assert notes(registry) == (["a"] if shared else [])
    assert notes(registry) == []
    engine.dispose()


def test_a_forked_process_is_refused(registry: Registry) -> None:
    """It would speak on its parent's connection."""
    with isolate(registry):
        add(registry, "a")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                notes(registry)
            except RuntimeError as error:
                code = 0 if "forked" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert notes(registry) == ["a"]
