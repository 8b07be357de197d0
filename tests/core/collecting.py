"""Collects garbage within ``ContextVar.set()``: ``python -m tests.core.collecting SCENE URL``.

A finalizer that sets a context variable there crashes CPython 3.10 and 3.11: a set makes a new
node of the context's tree, and with it may begin a collection, which takes the old node away.
A process of its own, because it may crash, and because other interpreters take part, which have
SQLAlchemy only.
"""

from __future__ import annotations

import contextvars
import gc
import sys
import warnings
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.support.models import Base, Database, Note, make_database
from wsgi_dbsession import Observer, SessionMiddleware, current_scope, find_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

READ = text("SELECT 1")

variable = contextvars.ContextVar("variable", default=0)
# So that the context is a tree, and not one node.
others = [contextvars.ContextVar(f"variable {number}", default=0) for number in range(40)]


class Setter:
    """What a finalizer must not do; this package is no part of it."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        others[0].set(1)


def make_bare_garbage(registry: scoped_session[Session]) -> None:
    Setter()


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Any:
    return [].append


def make_environ() -> WSGIEnvironment:
    return {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}


def forget(*kept: object) -> None:
    """Make a cycle, which nothing but a collection takes away."""
    cycle: list[object] = list(kept)
    cycle.append(cycle)


def make_response(registry: scoped_session[Session]) -> None:
    """Drop a response between two of its steps."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.add(Note(text=f"lost {registry.scalar(READ)}"))
        current_scope().on_rollback(variable.set, 1)
        yield b"one"

    response = SessionMiddleware(app, registry)(make_environ(), start_response)
    forget(iter(response))


def hold_block(registry: scoped_session[Session]) -> Iterator[None]:
    with session_scope(registry) as scope:
        registry.add(Note(text=f"lost {registry.scalar(READ)}"))
        scope.on_rollback(variable.set, 1)
        yield


def make_block(registry: scoped_session[Session]) -> None:
    """Drop a generator that is suspended in a block."""
    generator = hold_block(registry)
    next(generator)
    forget(generator)


def make_block_in_response(registry: scoped_session[Session]) -> None:
    """Drop a response whose body is suspended in a block."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.add(Note(text="lost"))
        with session_scope(registry):
            registry.scalar(READ)
            yield b"one"

    forget(iter(SessionMiddleware(app, registry)(make_environ(), start_response)))


GARBAGE: dict[str, Callable[[scoped_session[Session]], None]] = {
    "bare": make_bare_garbage,
    "response": make_response,
    "block": make_block,
    "block in a response": make_block_in_response,
}


def set_variable(registry: scoped_session[Session]) -> None:
    variable.set(variable.get() + 1)


def serve_list(registry: scoped_session[Session]) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        scope = current_scope()
        registry.add(Note(text="kept"))
        assert current_scope() is scope
        start_response("200 OK", [])
        return [b"one"]

    SessionMiddleware(app, registry)(make_environ(), start_response)


def serve_generator(registry: scoped_session[Session]) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        scope = current_scope()
        start_response("200 OK", [])
        yield b"one"
        assert current_scope() is scope
        with session_scope(registry):
            registry.add(Note(text="kept"))
        assert current_scope() is scope

    response: Any = SessionMiddleware(app, registry)(make_environ(), start_response)
    assert b"".join(response) == b"one"
    response.close()


VICTIMS: tuple[tuple[Callable[[scoped_session[Session]], None], int], ...] = (
    # and within how many allocations the collection begins
    (set_variable, 12),
    (serve_list, 300),
    (serve_generator, 300),
)


def collect_within(
    database: Database,
    registry: scoped_session[Session],
    make: Callable[[scoped_session[Session]], None],
) -> None:
    expected = 0
    gc.freeze()  # the libraries, so that a collection is quick
    for victim, allocations in VICTIMS:
        for number in range(allocations):
            gc.disable()
            make(registry)
            gc.set_threshold(gc.get_count()[0] + number, 1, 1)
            gc.enable()
            victim(registry)
            gc.set_threshold(700, 10, 10)
            gc.collect()
            assert find_scope() is None
            expected += victim is not set_variable
    pool: Any = database.engine.pool
    assert pool.checkedout() == 0
    assert database.notes() == ["kept"] * expected


def main(scene: str, url: str) -> None:
    warnings.simplefilter("ignore", ResourceWarning)
    for each in others:
        each.set(1)
    database = make_database(url)
    Base.metadata.create_all(database.observer)
    registry = scoped_session(sessionmaker(database.engine), scopefunc=current_scope)
    SessionMiddleware(lambda environ, start_response: [], registry, observers=[Observer()])
    event.listen(registry.session_factory, "after_rollback", lambda _: variable.get())
    collect_within(database, registry, GARBAGE[scene])
    database.engine.dispose()
    print("well")


if __name__ == "__main__":
    main(*sys.argv[1:])
