"""``session_scope``: a unit of work without a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tests.support.errors import AppError, Kill, raise_kill
from tests.support.models import Book, Database, Note, make_engine
from tests.support.wsgi import (
    BODIES,
    Program,
    Server,
    assert_nothing_left,
    make_environ,
    make_registry,
    open_sessions,
)
from wsgi_dbsession import Scope, SessionMiddleware, current_scope, find_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator
    from pathlib import Path

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

pytestmark = pytest.mark.promise("blocks")


def test_a_block_is_committed_at_its_end(
    database: Database, registry: scoped_session[Session]
) -> None:
    """What the block did is committed when it ends, and no scope is left."""
    with session_scope(registry) as scope:
        registry.add(Note(text="a"))
        assert database.notes() == []

    assert database.notes() == ["a"]
    assert (scope.outcome, scope.reason) == ("commit", "complete")
    assert_nothing_left(registry)


@pytest.mark.parametrize("error", [AppError, Kill], ids=["an error", "an interruption"])
def test_a_block_that_raises_is_rolled_back(
    database: Database, registry: scoped_session[Session], error: type[BaseException]
) -> None:
    """The block's own error propagates, and nothing of its work is left."""
    with pytest.raises(error), session_scope(registry) as scope:
        registry.add(Note(text="a"))
        registry.flush()
        raise error

    assert database.notes() == []
    assert (scope.outcome, scope.reason) == ("rollback", "error")
    assert_nothing_left(registry)


def test_a_doomed_block_is_rolled_back(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """A dry run: everything works, and nothing is kept."""
    with session_scope(sqlite_registry) as scope:
        sqlite_registry.add(Note(text="a"))
        sqlite_registry.flush()
        scope.doom()

    assert sqlite_database.notes() == []
    assert (scope.outcome, scope.reason) == ("rollback", "doomed")


def test_a_block_whose_commit_fails_raises(
    database: Database, registry: scoped_session[Session]
) -> None:
    """The error of the commit comes out of the block, all is rolled back, and no scope is left."""
    with pytest.raises(IntegrityError), session_scope(registry) as scope:
        registry.add_all([Note(text="a"), Book(author_id=7)])

    assert database.notes() == []
    assert (scope.outcome, scope.reason) == ("rollback", "rolled back")
    assert_nothing_left(registry)


@pytest.mark.parametrize("outer", ["a request", "a block"])
def test_a_block_in_a_scope_is_independent(
    postgres_database: Database, postgres_registry: scoped_session[Session], outer: str
) -> None:
    """An audit row survives the rollback around it, and the outer scope is in force again."""

    def work() -> None:
        scope, session = current_scope(), postgres_registry()
        session.add(Note(text="lost"))
        session.flush()
        with session_scope(postgres_registry) as inner:
            assert current_scope() is inner is not scope
            assert postgres_registry() is not session
            postgres_registry.add(Note(text="audit"))
        assert current_scope() is scope
        assert postgres_registry() is session
        raise AppError

    with pytest.raises(AppError):
        if outer == "a block":
            with session_scope(postgres_registry):
                work()
        else:
            app = BODIES["unsized generator"](Program(late=work))
            Server().run(SessionMiddleware(app, postgres_registry), make_environ())

    assert postgres_database.notes() == ["audit"]


def test_a_lost_block_leaves_the_work_around_it_alone(
    postgres_database: Database, postgres_registry: scoped_session[Session]
) -> None:
    """The rollback of an inner block is not that of the outer one."""
    with session_scope(postgres_registry):
        postgres_registry.add(Note(text="kept"))
        postgres_registry.flush()
        with pytest.raises(AppError), session_scope(postgres_registry):
            postgres_registry.add(Note(text="lost"))
            raise AppError

    assert postgres_database.notes() == ["kept"]


def test_a_block_takes_over_the_registries_around_it(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """A registry that the block does not name works there all the same, and is cleaned up."""
    named = make_registry(sqlite_database.engine)
    other = make_registry(make_engine(f"sqlite:///{tmp_path / 'other.db'}"))
    with session_scope(other), session_scope(named) as inner:
        assert other.scalar(text("SELECT 1")) == 1
        assert list(inner.sessions.values()) == [other()]

    assert_nothing_left(named, other)
    other.session_factory.kw["bind"].dispose()


def test_a_block_is_entered_once_at_a_time(sqlite_registry: scoped_session[Session]) -> None:
    """Entered twice it says so, and the first entry goes on; afterwards it may be used again."""
    block = session_scope(sqlite_registry)
    with block as scope:
        with pytest.raises(RuntimeError, match="Write `with session_scope"), block:
            pass
        assert current_scope() is scope
    with block as again:
        assert again is not scope


def test_a_decorated_function_is_a_block_for_every_call(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """Arguments, result, name and recursion work, and each call has a scope of its own."""
    scopes: list[Scope] = []

    @session_scope(sqlite_registry)
    def job(depth: int, *, name: str) -> str:
        """Work."""
        scopes.append(current_scope())
        if depth:
            return job(depth - 1, name=name)
        sqlite_registry.add(Note(text=name))
        return name.upper()

    assert job(1, name="a") == "A"
    assert job(0, name="b") == "B"
    assert (job.__name__, job.__doc__) == ("job", "Work.")
    assert sqlite_database.notes() == ["a", "b"]
    assert len({id(scope) for scope in scopes}) == 3
    assert {scope.name for scope in scopes} == {job.__qualname__}


def test_a_decorated_function_that_raises_is_rolled_back(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """The error comes out of the call, and its work is gone."""

    @session_scope(sqlite_registry)
    def job() -> None:
        sqlite_registry.add(Note(text="a"))
        raise AppError

    with pytest.raises(AppError):
        job()

    assert sqlite_database.notes() == []


def test_a_block_left_open_does_not_end_the_scope_of_others(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """A generator that is closed in the midst of another request leaves that one's scope alone."""

    def abandoned() -> Generator[None]:
        with session_scope(sqlite_registry):
            sqlite_registry.add(Note(text="abandoned"))
            yield

    kept: list[Generator[None]] = []

    def first() -> None:
        kept.append(generator := abandoned())
        next(generator)

    def second() -> None:
        scope = current_scope()
        sqlite_registry.add(Note(text="second"))
        kept.pop().close()  # as the garbage collector does it
        assert current_scope() is scope
        sqlite_registry.add(Note(text="second"))

    for early in (first, second):
        app = BODIES["list body"](Program(early))
        Server().run(SessionMiddleware(app, sqlite_registry), make_environ())

    assert sqlite_database.notes() == ["second", "second"]


def test_the_context_stays_clean_where_a_block_left_open_is_closed(
    sqlite_registry: scoped_session[Session],
) -> None:
    """Outside of any scope there is none after it, either."""

    def abandoned() -> Generator[None]:
        with session_scope(sqlite_registry):
            yield

    kept: list[Generator[None]] = []

    def early() -> None:
        kept.append(generator := abandoned())
        next(generator)

    app = BODIES["list body"](Program(early))
    Server().run(SessionMiddleware(app, sqlite_registry), make_environ())
    assert not open_sessions(sqlite_registry)

    kept.pop().close()

    assert_nothing_left(sqlite_registry)


def test_a_block_that_is_closed_between_two_steps_takes_no_scope_away(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """The request goes on in its own scope, though one that it left open is gone meanwhile."""
    kept: list[Generator[None]] = []

    def abandoned() -> Generator[None]:
        with session_scope(sqlite_registry):
            yield

    def early() -> None:
        kept.append(generator := abandoned())
        next(generator)

    def late() -> None:
        sqlite_registry.add(Note(text="late"))

    app = BODIES["unsized generator"](Program(early, late))
    response = SessionMiddleware(app, sqlite_registry)(make_environ(), Server().start_response)
    blocks = iter(response)
    next(blocks)

    kept.pop().close()

    assert list(blocks) == [b"two"]
    response.close()  # type: ignore[attr-defined]
    assert sqlite_database.notes() == ["late"]


def generator_function() -> Iterator[None]:
    yield


async def coroutine_function() -> None:
    pass


async def async_generator_function() -> AsyncIterator[None]:
    yield


def test_blocks_may_end_in_another_order(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """Two generators, each with a block of its own: the one that goes on has its scope."""

    def block(text: str) -> Iterator[Scope]:
        with session_scope(sqlite_registry) as scope:
            yield scope
            assert current_scope() is scope
            sqlite_registry.add(Note(text=text))

    first, second = block("first"), block("second")
    outer, inner = next(first), next(second)
    with pytest.raises(AssertionError):
        next(first)  # in the block of the second, which was entered after it
    assert current_scope() is inner
    assert list(second) == []

    assert find_scope() is None
    assert (outer.outcome, inner.outcome) == (None, "commit")
    assert sqlite_database.notes() == ["second"]
    with session_scope(sqlite_registry):
        pass  # until then, the context keeps the last of them


def test_a_hook_sees_the_scope_that_it_belongs_to(
    sqlite_registry: scoped_session[Session],
) -> None:
    """Though a block is open where it was registered, and where the outcome comes."""
    seen: list[bool] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        scope = current_scope()
        start_response("200 OK", [("Content-Length", "3")])
        with session_scope(sqlite_registry):
            scope.on_commit(lambda: seen.append(current_scope() is scope))
            yield b"one"

    Server().run(SessionMiddleware(app, sqlite_registry), make_environ())

    assert seen == [True]


@pytest.mark.promise("constructors")
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(generator_function, id="a generator function"),
        pytest.param(coroutine_function, id="a coroutine function"),
        pytest.param(async_generator_function, id="an async generator function"),
    ],
)
def test_what_runs_after_its_call_is_not_decorated(
    sqlite_registry: scoped_session[Session], function: Callable[[], object]
) -> None:
    """The scope would be over before the work begins, and the message names the mend."""
    with pytest.raises(TypeError, match=rf"{function.__name__}, which runs after .* inside of it"):
        session_scope(sqlite_registry)(function)


def test_a_block_that_was_interrupted_as_it_began_can_be_entered_again(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing calls its end, and no scope is left."""
    block = session_scope(sqlite_registry)
    with monkeypatch.context() as patch:
        patch.setattr(Scope, "enter_block", raise_kill)
        with pytest.raises(Kill):
            block.__enter__()
    assert find_scope() is None

    with block:
        sqlite_registry.add(Note(text="a"))

    assert sqlite_database.notes() == ["a"]
