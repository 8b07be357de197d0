"""What belongs to a request stays with it, in whatever thread, greenlet or context it runs."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import gevent
import pytest

from tests.support.models import Database, Note
from tests.support.wsgi import (
    BLOCK_BY_BLOCK,
    BODIES,
    Program,
    Server,
    assert_nothing_left,
    make_environ,
)
from wsgi_dbsession import NoScopeError, Scope, SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession._moment import CommitOn

T = TypeVar("T")

MOMENTS: list[CommitOn] = ["complete", "headers", "close"]


def assert_no_scope() -> None:
    with pytest.raises(NoScopeError):
        current_scope()


def find_scope() -> Scope | None:
    """Return the scope in force here, if there is one."""
    try:
        return current_scope()
    except NoScopeError:
        return None


# -- several requests at once ---------------------------------------------------------------------


class Meeting:
    """An application of which several requests are in a step at the same time."""

    def __init__(self, registry: scoped_session[Session], meet: Callable[[], object]) -> None:
        self.registry = registry
        self.meet = meet
        self.scopes: list[Scope] = []

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        """Write a row before and after each meeting, and look whether anything has changed."""
        name = environ["PATH_INFO"]
        scope, session = current_scope(), self.registry()
        self.scopes.append(scope)
        start_response("404 Not Found" if name.endswith("lost") else "200 OK", [])
        for number in range(3):
            self.registry.add(Note(text=f"{name} {number}"))
            self.registry.flush()
            self.meet()
            assert current_scope() is scope
            assert self.registry() is session
            yield b"one"


NAMES = ["/1/kept", "/2/lost", "/3/kept", "/4/lost"]
KEPT = sorted(f"{name} {number}" for name in NAMES if "kept" in name for number in range(3))


@pytest.mark.promise("requests do not meet")
def test_threads_do_not_meet(
    postgres_database: Database, postgres_registry: scoped_session[Session]
) -> None:
    """Requests in threads, all in a step at once: each has its scope, Session and outcome."""
    meeting = Meeting(postgres_registry, threading.Barrier(len(NAMES), timeout=20).wait)
    app = SessionMiddleware(meeting, postgres_registry)

    def serve(name: str) -> Scope | None:
        Server().run(app, make_environ(path=name))
        return find_scope()

    with ThreadPoolExecutor(len(NAMES)) as threads:
        left = list(threads.map(serve, NAMES))

    assert left == [None] * len(NAMES)
    assert len({id(scope) for scope in meeting.scopes}) == len(NAMES)
    assert postgres_database.notes() == KEPT


@pytest.mark.promise("requests do not meet")
def test_greenlets_do_not_meet(
    postgres_database: Database, postgres_registry: scoped_session[Session]
) -> None:
    """Requests in greenlets of one thread, which switch in the midst of each step."""
    running: list[int] = []
    together: list[int] = []

    def meet() -> None:
        running.append(1)
        gevent.sleep(0)
        together.append(len(running))
        gevent.sleep(0)
        running.pop()

    meeting = Meeting(postgres_registry, meet)
    app = SessionMiddleware(meeting, postgres_registry)

    def serve(name: str) -> Scope | None:
        Server().run(app, make_environ(path=name))
        return find_scope()

    greenlets = [gevent.spawn(serve, name) for name in NAMES]
    gevent.joinall(greenlets, timeout=20, raise_error=True)

    assert [greenlet.value for greenlet in greenlets] == [None] * len(NAMES)
    assert max(together) == len(NAMES)
    assert postgres_database.notes() == KEPT


@pytest.mark.promise("requests do not meet")
@pytest.mark.parametrize("commit_on", MOMENTS)
def test_responses_that_are_interleaved_do_not_meet(
    postgres_database: Database,
    postgres_registry: scoped_session[Session],
    commit_on: CommitOn,
) -> None:
    """An event loop that sends one block of each in turn, in one thread and one context."""
    app = SessionMiddleware(
        Meeting(postgres_registry, lambda: None), postgres_registry, commit_on=commit_on
    )
    responses: list[Any] = []
    for name in NAMES:
        responses.append(app(make_environ(path=name), Server().start_response))
        assert_no_scope()
    for number in range(4):
        for response in responses if number % 2 else responses[::-1]:
            assert next(response, b"end") == (b"one" if number < 3 else b"end")
            assert_no_scope()
    for response in responses:
        response.close()
        assert_no_scope()

    assert postgres_database.notes() == KEPT


# -- one request in several places ----------------------------------------------------------------


def here(step: Callable[[], T]) -> T:
    return step()


def in_a_thread(step: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(step).result(20)


def in_a_greenlet(step: Callable[[], T]) -> T:
    return gevent.spawn(step).get(timeout=20)


def in_a_copied_context(step: Callable[[], T]) -> T:
    return contextvars.copy_context().run(step)


def in_an_empty_context(step: Callable[[], T]) -> T:
    return contextvars.Context().run(step)


def in_a_block(registry: scoped_session[Session], step: Callable[[], T]) -> T:
    with session_scope(registry) as scope:
        result = step()
        assert current_scope() is scope
        return result


@pytest.mark.promise("requests do not meet")
@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", BLOCK_BY_BLOCK)
def test_each_step_may_be_made_somewhere_else(
    postgres_database: Database,
    postgres_registry: scoped_session[Session],
    body: str,
    commit_on: CommitOn,
) -> None:
    """Whatever makes a step, a thread, a greenlet, a context: the request has its one scope."""
    seen: list[tuple[Scope, Session]] = []

    def look() -> None:
        seen.append((current_scope(), postgres_registry()))
        postgres_registry.add(Note(text="a"))
        postgres_registry.flush()

    app = BODIES[body](Program(look, look, look, look))
    app = SessionMiddleware(app, postgres_registry, commit_on=commit_on)
    places: list[Callable[[Callable[[], object]], object]] = [
        in_a_thread,
        in_a_copied_context,
        functools.partial(in_a_block, postgres_registry),
        in_an_empty_context,
        in_a_greenlet,
    ]
    response: Any = None

    def begin() -> None:
        nonlocal response
        response = app(make_environ(), Server().start_response)

    steps: list[Callable[[], object]] = [
        begin,
        *[lambda: next(response, None)] * 3,
        lambda: response.close(),
    ]
    for place, step in zip(places, steps, strict=True):
        place(step)
        assert_no_scope()

    assert len(seen) == 4
    assert len({(id(scope), id(session)) for scope, session in seen}) == 1
    assert postgres_database.notes() == ["a"] * 4


@pytest.mark.promise("cleanup")
@pytest.mark.parametrize("place", [here, in_a_thread, in_a_copied_context, in_a_greenlet])
def test_an_error_leaves_no_scope_where_it_was_raised(
    sqlite_registry: scoped_session[Session], place: Callable[[Callable[[], object]], object]
) -> None:
    """The step that raises ends like any other."""

    def fail() -> None:
        sqlite_registry.add(Note(text="a"))
        raise ZeroDivisionError

    app = SessionMiddleware(BODIES["unsized generator"](Program(late=fail)), sqlite_registry)
    response: Any = app(make_environ(), Server().start_response)
    next(response)

    def step() -> None:
        with pytest.raises(ZeroDivisionError):
            next(response)
        assert_no_scope()

    place(step)

    assert_nothing_left(sqlite_registry)
    response.close()


# -- what a request starts ------------------------------------------------------------------------


def run(registry: scoped_session[Session], step: Callable[[], object]) -> None:
    """Do it in the middle of a request."""
    app = BODIES["unsized generator"](Program(late=step))
    Server().run(SessionMiddleware(app, registry), make_environ())


@pytest.mark.promise("threads")
def test_a_thread_of_the_application_has_no_scope(
    sqlite_registry: scoped_session[Session],
) -> None:
    """It is told what to do: a request's Session is not for two threads.

    Where the interpreter hands the context on to threads, the scope is seen there.
    """
    found: list[Scope | None] = []

    def step() -> None:
        thread = threading.Thread(target=lambda: found.append(find_scope()))
        thread.start()
        thread.join()
        inherited = getattr(sys.flags, "thread_inherit_context", False)
        assert found == [current_scope() if inherited else None]

    run(sqlite_registry, step)

    assert len(found) == 1


@pytest.mark.promise("threads")
def test_a_greenlet_of_the_application_has_no_scope(
    sqlite_registry: scoped_session[Session],
) -> None:
    """As a thread has none; the message names greenlets."""

    def step() -> None:
        with pytest.raises(NoScopeError, match="thread or greenlet of your own"):
            gevent.spawn(sqlite_registry).get(timeout=20)

    run(sqlite_registry, step)


@pytest.mark.promise("threads")
@pytest.mark.parametrize("place", [in_a_thread, in_a_greenlet])
def test_what_a_request_starts_may_open_a_scope(
    postgres_database: Database,
    postgres_registry: scoped_session[Session],
    place: Callable[[Callable[[], object]], object],
) -> None:
    """It is independent of the request, which goes on in its own."""

    def work() -> None:
        with session_scope(postgres_registry):
            postgres_registry.add(Note(text="child"))
        assert_no_scope()

    def step() -> None:
        scope = current_scope()
        postgres_registry.add(Note(text="lost"))
        postgres_registry.flush()
        place(work)
        assert current_scope() is scope
        scope.doom()

    run(postgres_registry, step)

    assert postgres_database.notes() == ["child"]


def test_a_copied_context_sees_the_scope_while_the_step_lasts(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """As with asyncio.to_thread, which the application waits for."""

    def work() -> Scope:
        sqlite_registry.add(Note(text="in a thread"))
        return current_scope()

    def step() -> None:
        assert asyncio.run(asyncio.to_thread(work)) is current_scope()

    run(sqlite_registry, step)

    assert sqlite_database.notes() == ["in a thread"]


@pytest.mark.promise("threads")
def test_a_copied_context_is_refused_when_the_step_is_over(
    sqlite_registry: scoped_session[Session],
) -> None:
    """Work that comes late cannot put a Session under a request that has gone on, or is over."""
    contexts: list[contextvars.Context] = []

    def step() -> None:
        contexts.append(contextvars.copy_context())
        sqlite_registry.add(Note())

    app = BODIES["unsized generator"](Program(late=step))
    response: Any = SessionMiddleware(app, sqlite_registry)(
        make_environ(), Server().start_response
    )
    next(response)
    next(response)

    for finish in (lambda: None, lambda: list(response), lambda: response.close()):
        finish()
        with pytest.raises(NoScopeError):
            contexts[0].run(sqlite_registry)

    assert_nothing_left(sqlite_registry)


@pytest.mark.promise("threads")
def test_a_copied_context_is_refused_when_the_block_is_over(
    sqlite_registry: scoped_session[Session],
) -> None:
    """The same holds for a block."""
    with session_scope(sqlite_registry) as scope:
        context = contextvars.copy_context()
        assert context.run(current_scope) is scope

    with pytest.raises(NoScopeError):
        context.run(sqlite_registry)


# -- blocks across steps --------------------------------------------------------------------------


def rows_in_a_block(
    registry: scoped_session[Session], name: str
) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    """Make an application whose body holds a block of its own open between two blocks."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        outer, session = current_scope(), registry()
        registry.add(Note(text=f"{name} outer"))
        yield b"before"
        assert current_scope() is outer
        with session_scope(registry) as inner:
            registry.add(Note(text=f"{name} inner"))
            yield b"within"
            assert current_scope() is inner
            assert registry() is not session
            registry.add(Note(text=f"{name} inner"))
            yield b"within"
            assert current_scope() is inner
        assert current_scope() is outer
        assert registry() is session
        yield b"after"

    return app


@pytest.mark.parametrize("place", [here, in_a_thread, in_an_empty_context, in_a_greenlet])
def test_a_block_stays_open_across_steps(
    postgres_database: Database,
    postgres_registry: scoped_session[Session],
    place: Callable[[Callable[[], object]], object],
) -> None:
    """Two such bodies, interleaved, wherever their steps are made: nothing of either is left."""
    responses: list[Any] = [
        SessionMiddleware(rows_in_a_block(postgres_registry, name), postgres_registry)(
            make_environ(), Server().start_response
        )
        for name in ("a", "b")
    ]
    for expected in (b"before", b"within", b"within", b"after", b"end"):
        for response in responses:
            assert place(functools.partial(next, response, b"end")) == expected
            assert_no_scope()
    for response in responses:
        response.close()

    assert postgres_database.notes() == [
        *("a inner", "a inner", "a outer"),
        *("b inner", "b inner", "b outer"),
    ]


@pytest.mark.promise("incomplete", "blocks")
@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_a_block_that_is_open_when_the_client_goes_away_is_rolled_back(
    postgres_database: Database, postgres_registry: scoped_session[Session], how: str
) -> None:
    """Neither the block nor the request around it was completed."""
    app = SessionMiddleware(rows_in_a_block(postgres_registry, "a"), postgres_registry)
    response: Any = app(make_environ(), Server().start_response)
    blocks = iter(response)
    assert [next(blocks), next(blocks)] == [b"before", b"within"]

    if how == "closed":
        response.close()
        del response, blocks
    else:
        with pytest.warns(ResourceWarning):
            del response, blocks

    assert_nothing_left(postgres_registry)
    assert postgres_database.notes() == []


@pytest.mark.parametrize("commit_on", MOMENTS)
def test_the_outcome_of_the_request_leaves_an_open_block_alone(
    postgres_database: Database,
    postgres_registry: scoped_session[Session],
    commit_on: CommitOn,
) -> None:
    """A body of known length is committed in its own scope, though it stands in a block."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "3")])
        outer = current_scope()
        outer.on_commit(lambda: postgres_registry.add(Note(text="hook")))
        postgres_registry.add(Note(text="outer"))
        with session_scope(postgres_registry) as inner:
            postgres_registry.add(Note(text="inner"))
            yield b"one"
            assert current_scope() is inner
            inner.doom()

    Server().run(SessionMiddleware(app, postgres_registry, commit_on=commit_on), make_environ())

    assert postgres_database.notes() == ["hook", "outer"]


@pytest.mark.promise("blocks")
def test_tasks_have_blocks_of_their_own(
    postgres_database: Database, postgres_registry: scoped_session[Session]
) -> None:
    """Coroutines that take turns inside of their blocks do not meet."""

    async def task(name: str) -> None:
        with session_scope(postgres_registry) as scope:
            for _ in range(2):
                postgres_registry.add(Note(text=name))
                postgres_registry.flush()
                await asyncio.sleep(0)
                assert current_scope() is scope
            if name == "lost":
                scope.doom()

    async def work() -> None:
        await asyncio.gather(task("a"), task("lost"), task("b"))

    asyncio.run(work())

    assert postgres_database.notes() == ["a", "a", "b", "b"]
