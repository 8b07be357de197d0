"""The unit of work: which outcome it has, who is told, and where its Session is."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import gevent
import pytest
from sqlalchemy import create_engine, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.models import Book, Database, Note, make_engine
from tests.wsgi import (
    ALL_AT_ONCE,
    BODIES,
    Program,
    Server,
    assert_nothing_left,
    make_environ,
    make_registry,
    nothing,
)
from wsgi_dbsession import (
    NoScopeError,
    Scope,
    SessionMiddleware,
    current_scope,
    session_scope,
)
from wsgi_dbsession._scope import SCOPE_CLASS, scopes_in_force

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator
    from pathlib import Path

    from wsgi_dbsession._response import CommitOn


class AppError(Exception):
    """The application's error."""


class Kill(BaseException):
    """What ends a greenlet or a process from outside, in the manner of GreenletExit."""


def fail() -> None:
    raise AppError


def doom() -> None:
    current_scope().doom()


def keep() -> None:
    current_scope().keep()


def keep_and_doom() -> None:
    current_scope().keep()
    current_scope().doom()


def doom_and_keep() -> None:
    current_scope().doom()
    current_scope().keep()


def keep_and_fail() -> None:
    current_scope().keep()
    raise AppError


def interrupt_by(error: BaseException) -> Callable[[], None]:
    def interrupt() -> None:
        raise error

    return interrupt


# -- the table ------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row of the table: what happens, and what becomes of the work."""

    outcome: str
    reason: str
    early: Callable[[], None] = nothing
    late: Callable[[], None] = nothing
    status: str = "200 OK"
    blocks: int | None = None
    raises: type[BaseException] | None = None


ROWS = {
    "nothing special": Row("commit", "complete"),
    "a redirect": Row("commit", "complete", status="303 See Other"),
    "an error before the body": Row("rollback", "error", early=fail, raises=AppError),
    "an error in the body": Row("rollback", "error", late=fail, raises=AppError),
    "a killed greenlet": Row(
        "rollback",
        "error",
        late=interrupt_by(gevent.GreenletExit()),
        raises=gevent.GreenletExit,
    ),
    "a timeout of gevent": Row(
        "rollback", "error", late=interrupt_by(gevent.Timeout()), raises=gevent.Timeout
    ),
    "the end of the process": Row(
        "rollback", "error", early=interrupt_by(SystemExit()), raises=SystemExit
    ),
    "a doomed scope": Row("rollback", "doomed", early=doom),
    "a scope that is doomed late": Row("rollback", "doomed", late=doom),
    "a doomed scope with a status that is vetoed": Row(
        "rollback", "doomed", early=doom, status="404 Not Found"
    ),
    "a status 4xx": Row("rollback", "veto", status="404 Not Found"),
    "a status 5xx": Row("rollback", "veto", status="500 Internal Server Error"),
    "keep in spite of the status": Row("commit", "kept", early=keep, status="401 Unauthorized"),
    "keep that is said late": Row("commit", "kept", late=keep, status="401 Unauthorized"),
    "keep beaten by doom": Row("rollback", "doomed", early=keep_and_doom),
    "keep beaten by an earlier doom": Row("rollback", "doomed", early=doom_and_keep),
    "keep beaten by an error": Row("rollback", "error", late=keep_and_fail, raises=AppError),
    "a client that goes away": Row("rollback", "incomplete", blocks=1),
    "keep beaten by a client that goes away": Row("rollback", "incomplete", early=keep, blocks=1),
    "a client that goes away from a doomed scope": Row("rollback", "doomed", early=doom, blocks=1),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_first_row_that_holds_is_the_outcome(
    sqlite_database: Database, sqlite_registry: scoped_session[Session], row: Row, body: str
) -> None:
    """Each row of the table holds for each kind of body."""
    check_row(sqlite_database, sqlite_registry, row, body)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_table_holds_on_postgres(
    postgres_database: Database, postgres_registry: scoped_session[Session], row: Row
) -> None:
    """Each row of the table holds where transactions are isolated from each other."""
    check_row(postgres_database, postgres_registry, row, "unsized generator")


def check_row(database: Database, registry: scoped_session[Session], row: Row, body: str) -> None:
    scopes: list[Scope] = []

    def early() -> None:
        scopes.append(current_scope())
        registry.add(Note(text="early"))
        row.early()

    def late() -> None:
        registry.add(Note(text="late"))
        row.late()

    app = BODIES[body](Program(early=early, late=late, status=row.status))
    expected = (row.outcome, row.reason)
    if row.reason == "incomplete" and body in ALL_AT_ONCE:
        # The body was complete before the client went away.
        expected = ("commit", "kept" if row.early is keep else "complete")

    with pytest.raises(row.raises) if row.raises else contextlib.nullcontext():
        Server().run(SessionMiddleware(app, registry), make_environ("POST"), blocks=row.blocks)

    (scope,) = scopes
    assert (scope.outcome, scope.reason) == expected
    assert database.notes() == (["early", "late"] if scope.outcome == "commit" else [])
    assert_nothing_left(registry)


def add_one(registry: scoped_session[Session]) -> None:
    registry.add(Note(text="b"))


def change_one(registry: scoped_session[Session]) -> None:
    registry.scalars(select(Note)).one().text = "b"


def delete_one(registry: scoped_session[Session]) -> None:
    registry.delete(registry.scalars(select(Note)).one())


def insert_by_core(registry: scoped_session[Session]) -> None:
    registry.execute(insert(Note).values(text="b"))


def insert_by_text(registry: scoped_session[Session]) -> None:
    registry.execute(text("INSERT INTO note (text) VALUES ('b')"))


def insert_by_connection(registry: scoped_session[Session]) -> None:
    registry.connection().exec_driver_sql("INSERT INTO note (text) VALUES ('b')")


def insert_by_query_with_returning(registry: scoped_session[Session]) -> None:
    statement = text("INSERT INTO note (text) VALUES ('b') RETURNING id")
    assert registry.scalar(statement)


def read(registry: scoped_session[Session]) -> None:
    registry.scalars(select(Note)).one()


def idle(registry: scoped_session[Session]) -> None:
    registry()


def insert_in_a_savepoint(registry: scoped_session[Session]) -> None:
    with registry.begin_nested():
        registry.add(Note(text="b"))


def insert_in_an_open_savepoint(registry: scoped_session[Session]) -> None:
    registry.begin_nested()
    registry.add(Note(text="b"))


@pytest.mark.parametrize(
    ("work", "notes"),
    [
        pytest.param(add_one, ["a", "b"], id="an object that is added"),
        pytest.param(change_one, ["b"], id="an object that is changed"),
        pytest.param(delete_one, [], id="an object that is deleted"),
        pytest.param(insert_by_core, ["a", "b"], id="a Core insert"),
        pytest.param(insert_by_text, ["a", "b"], id="textual SQL"),
        pytest.param(insert_by_connection, ["a", "b"], id="the driver's SQL"),
        pytest.param(insert_by_query_with_returning, ["a", "b"], id="SQL that returns rows"),
        pytest.param(insert_in_a_savepoint, ["a", "b"], id="a savepoint"),
        pytest.param(insert_in_an_open_savepoint, ["a", "b"], id="a savepoint left open"),
    ],
)
@pytest.mark.parametrize("fails", [False, True], ids=["committed", "rolled back"])
def test_every_change_counts(
    database: Database,
    registry: scoped_session[Session],
    work: Callable[[scoped_session[Session]], None],
    notes: list[str],
    fails: bool,
) -> None:
    """A transaction is committed or rolled back, whatever way of change it holds."""
    with session_scope(registry):
        registry.add(Note(text="a"))

    expected = ["a"] if fails else notes

    with pytest.raises(AppError) if fails else contextlib.nullcontext(), session_scope(registry):
        work(registry)
        if fails:
            raise AppError

    assert database.notes() == expected


def test_what_the_application_committed_itself_stays(
    database: Database, registry: scoped_session[Session]
) -> None:
    """A commit of the application is not undone by the outcome."""
    with pytest.raises(AppError), session_scope(registry) as scope:
        registry.add(Note(text="own"))
        registry.commit()
        registry.add(Note(text="lost"))
        raise AppError

    assert scope.outcome == "rollback"
    assert database.notes() == ["own"]


# -- scope and Session ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mend", ["SessionMiddleware(app, Session)", "with session_scope(Session)"]
)
def test_no_scope_says_what_to_do(sqlite_registry: scoped_session[Session], mend: str) -> None:
    """Outside of any scope a Session is refused, and the message names the mend."""
    with pytest.raises(NoScopeError, match="there is no scope here") as caught:
        sqlite_registry.add(Note())

    assert mend in str(caught.value)


def test_a_scope_without_work_costs_nothing(
    database: Database, registry: scoped_session[Session]
) -> None:
    """There is no Session and no connection before the first use."""
    with session_scope(registry) as scope:
        assert current_scope() is scope
        assert not registry.registry.has()

    assert scope.outcome == "commit"
    assert database.engine.pool.status().startswith("Pool size: 5  Connections in pool: 0 ")


def test_a_scope_has_one_session_and_its_own(sqlite_registry: scoped_session[Session]) -> None:
    """The Session is the same within a scope, and another in the next."""
    with session_scope(sqlite_registry):
        first = sqlite_registry()
        assert sqlite_registry() is first
    with session_scope(sqlite_registry):
        assert sqlite_registry() is not first


def test_a_scope_tells_about_itself() -> None:
    """Its repr says what it is of, and what became of it."""
    scope = Scope((), make_environ("POST", "/notes", SCRIPT_NAME="/app"))
    assert repr(scope) == f"<Scope of POST /app/notes at {id(scope):#x}: undecided>"

    scope.enter()
    assert current_scope() is scope
    scope.end()
    scope.leave()

    assert repr(scope) == f"<Scope at {id(scope):#x}: commit>"


def test_a_request_carries_its_scope(sqlite_registry: scoped_session[Session]) -> None:
    """The environ has the scope, the scope has the environ while the request lasts, and info."""
    environ = make_environ()
    scopes: list[Scope] = []

    def early() -> None:
        scope = current_scope()
        scopes.append(scope)
        assert environ["wsgi_dbsession.scope"] is scope
        assert scope.environ is environ
        assert scope.in_step
        assert (scope.outcome, scope.reason) == (None, None)
        scope.info["seen"] = True

    Server().run(SessionMiddleware(BODIES["list body"](Program(early)), sqlite_registry), environ)

    (scope,) = scopes
    assert scope.info == {"seen": True}
    assert scope.environ is None
    assert not scope.in_step
    assert scope.registries == (sqlite_registry,)


def test_a_registry_may_have_scopes_of_another_class(
    sqlite_registry: scoped_session[Session],
) -> None:
    """For extras that look on: in a block, and in a request."""

    class Watched(Scope):
        pass

    setattr(sqlite_registry, SCOPE_CLASS, Watched)
    kinds: list[type[Scope]] = []
    app = BODIES["list body"](Program(lambda: kinds.append(type(current_scope()))))

    Server().run(SessionMiddleware(app, sqlite_registry), make_environ())
    with session_scope(sqlite_registry) as scope:
        kinds.append(type(scope))

    assert kinds == [Watched, Watched]


def test_the_scopes_in_force_are_found_from_the_innermost(
    sqlite_registry: scoped_session[Session],
) -> None:
    """For extras that ask whether a scope of some kind is around them."""
    with session_scope(sqlite_registry) as outer, session_scope(sqlite_registry) as inner:
        assert list(scopes_in_force()) == [inner, outer]

    assert list(scopes_in_force()) == []


# -- session_scope --------------------------------------------------------------------------------


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
    assert (scope.outcome, scope.reason) == ("rollback", "commit failed")
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
        assert inner.registries == (named, other)
        assert len(other.registry.registry) == 1

    assert_nothing_left(named, other)
    other.session_factory.kw["bind"].dispose()


def test_a_block_is_entered_once_at_a_time(sqlite_registry: scoped_session[Session]) -> None:
    """Entered twice it says so, and the first entry goes on; afterwards it may be used again."""
    block = session_scope(sqlite_registry)
    with block as scope:
        with pytest.raises(RuntimeError, match="write `with session_scope"), block:
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
    assert sqlite_registry.registry.registry == {}

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
    with pytest.raises(TypeError, match=rf"{function.__name__} runs after .* inside of it"):
        session_scope(sqlite_registry)(function)


# -- registries -----------------------------------------------------------------------------------


def session_class() -> scoped_session[Session]:
    return scoped_session(cast("Any", Session), scopefunc=current_scope)


def plain_function() -> scoped_session[Session]:
    return scoped_session(cast("Any", lambda: Session()), scopefunc=current_scope)


def thread_local() -> scoped_session[Session]:
    return scoped_session(sessionmaker())


def other_scopefunc() -> scoped_session[Session]:
    return scoped_session(sessionmaker(), scopefunc=lambda: 1)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        pytest.param(sessionmaker, TypeError, "is a scoped_session, not", id="a sessionmaker"),
        pytest.param(Session, TypeError, "is a scoped_session, not", id="a Session"),
        pytest.param(
            lambda: create_engine("sqlite://"), TypeError, "is a scoped_session", id="an Engine"
        ),
        pytest.param(thread_local, ValueError, "is not current_scope", id="a thread-local one"),
        pytest.param(other_scopefunc, ValueError, "is not current_scope", id="another scopefunc"),
        pytest.param(session_class, TypeError, "is not a sessionmaker", id="over a Session class"),
        pytest.param(plain_function, TypeError, "is not a sessionmaker", id="over a function"),
    ],
)
@pytest.mark.parametrize("user", ["the middleware", "a block"])
def test_a_registry_that_cannot_work_is_refused(
    make: Callable[[], Any], kind: type[Exception], message: str, user: str
) -> None:
    """What is wrong is said where it is given, and how to make a registry."""
    given = make()

    with pytest.raises(kind, match=message) as caught:
        if user == "a block":
            session_scope(given)
        else:
            SessionMiddleware(BODIES["list body"](Program()), given)

    assert "scoped_session(sessionmaker(engine), scopefunc=current_scope)" in str(caught.value)


def test_a_block_needs_a_registry() -> None:
    """None at all is refused, with the mend."""
    with pytest.raises(ValueError, match=r"no session registry was given: .*scoped_session\("):
        session_scope()


def test_a_registry_is_counted_once(sqlite_registry: scoped_session[Session]) -> None:
    """Given twice, it takes part once."""
    with session_scope(sqlite_registry, sqlite_registry) as scope:
        assert scope.registries == (sqlite_registry,)


# -- hooks ----------------------------------------------------------------------------------------


def test_hooks_run_after_the_commit_in_order(
    database: Database, registry: scoped_session[Session]
) -> None:
    """They see the committed row, in the scope; those for a rollback are not called."""
    calls: list[object] = []
    with session_scope(registry) as scope:
        registry.add(Note(text="a"))
        scope.on_commit(lambda: calls.append(database.notes()))
        scope.on_rollback(lambda: calls.append("rollback"))
        scope.on_commit(lambda: calls.append(current_scope() is scope))
        scope.on_commit(lambda: calls.append(scope.outcome))
        assert calls == []

    assert calls == [["a"], True, "commit"]


def test_hooks_run_after_the_rollback_in_order(
    postgres_database: Database, postgres_registry: scoped_session[Session]
) -> None:
    """The row is gone, and its lock; those for a commit are not called."""
    calls: list[object] = []

    def rolled_back() -> None:
        postgres_registry.execute(text("LOCK TABLE note IN ACCESS EXCLUSIVE MODE NOWAIT"))
        calls.append(postgres_registry.scalars(select(Note)).all())

    with pytest.raises(AppError), session_scope(postgres_registry) as scope:
        postgres_registry.add(Note(text="a"))
        postgres_registry.flush()
        scope.on_rollback(rolled_back)
        scope.on_commit(lambda: calls.append("commit"))
        scope.on_rollback(lambda: calls.append(scope.outcome))
        raise AppError

    assert calls == [[], "rollback"]


def test_hooks_learn_that_the_commit_failed(
    database: Database, registry: scoped_session[Session]
) -> None:
    """A failed commit is a rollback for them."""
    calls: list[str] = []
    with pytest.raises(IntegrityError), session_scope(registry) as scope:
        scope.on_commit(lambda: calls.append("commit"))
        scope.on_rollback(lambda: calls.append("rollback"))
        registry.add(Book(author_id=7))

    assert calls == ["rollback"]


def test_a_hook_runs_though_no_session_was_used(sqlite_registry: scoped_session[Session]) -> None:
    """A commit of nothing counts."""
    calls: list[str] = []
    with session_scope(sqlite_registry) as scope:
        scope.on_commit(lambda: calls.append("commit"))

    assert calls == ["commit"]


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
def test_an_error_in_a_hook_is_logged_only(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
    outcome: str,
) -> None:
    """The outcome stays, the other hooks run, and the log has the traceback."""
    calls: list[str] = []
    with session_scope(sqlite_registry) as scope:
        sqlite_registry.add(Note(text="a"))
        for register in (scope.on_commit, scope.on_rollback):
            register(fail)
            register(lambda: calls.append("next"))
        if outcome == "rollback":
            scope.doom()

    assert scope.outcome == outcome
    assert sqlite_database.notes() == (["a"] if outcome == "commit" else [])
    assert calls == ["next"]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("wsgi_dbsession", logging.ERROR)
    assert record.getMessage() == f"a hook failed after the {outcome}: {fail!r}"
    assert record.exc_info is not None
    assert record.exc_info[0] is AppError


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
def test_an_interruption_in_a_hook_propagates(
    sqlite_database: Database, sqlite_registry: scoped_session[Session], outcome: str
) -> None:
    """A greenlet that is killed in a hook ends; the outcome stays, and nothing is left."""
    with pytest.raises(Kill), session_scope(sqlite_registry) as scope:
        sqlite_registry.add(Note(text="a"))
        scope.on_commit(interrupt_by(Kill()))
        scope.on_rollback(interrupt_by(Kill()))
        if outcome == "rollback":
            scope.doom()

    assert scope.outcome == outcome
    assert sqlite_database.notes() == (["a"] if outcome == "commit" else [])
    assert_nothing_left(sqlite_registry)


def test_the_first_error_beats_an_interruption_in_a_hook(
    sqlite_registry: scoped_session[Session],
) -> None:
    """The error of the block propagates, not that of a hook after it."""
    with pytest.raises(AppError), session_scope(sqlite_registry) as scope:
        scope.on_rollback(interrupt_by(Kill()))
        raise AppError


def test_what_a_hook_writes_is_committed(
    database: Database, registry: scoped_session[Session]
) -> None:
    """A hook may begin a transaction, and register another hook, which runs too, and so on."""
    calls: list[str] = []
    with session_scope(registry) as scope:
        registry.add(Note(text="a"))

        def hook() -> None:
            registry.add(Note(text="hook"))
            scope.on_commit(lambda: scope.on_commit(last))

        def last() -> None:
            scope.on_commit(lambda: calls.append("last"))

        scope.on_commit(hook)

    assert calls == ["last"]
    assert database.notes() == ["a", "hook"]


def test_what_a_hook_writes_after_an_error_is_rolled_back(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """It is the work of the same failed scope."""
    with pytest.raises(AppError), session_scope(sqlite_registry) as scope:
        scope.on_rollback(lambda: sqlite_registry.add(Note(text="hook")))
        raise AppError

    assert sqlite_database.notes() == []


def test_a_hook_that_registers_itself_comes_to_an_end(
    sqlite_registry: scoped_session[Session],
) -> None:
    """A hook that writes, and asks to be called again after that commit, does not run for ever."""
    calls: list[str] = []
    with session_scope(sqlite_registry) as scope:

        def hook() -> None:
            calls.append("hook")
            sqlite_registry.add(Note(text="hook"))

        scope.on_commit(hook)

    assert calls == ["hook"]


# -- the log --------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit_on", ["complete", "headers", "close"])
@pytest.mark.parametrize("body", BODIES)
def test_the_normal_way_logs_nothing(
    sqlite_registry: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
    body: str,
    commit_on: CommitOn,
) -> None:
    """A commit, a rollback after an error and one after an early close: not one line."""
    caplog.set_level(logging.DEBUG, "wsgi_dbsession")

    def early() -> None:
        sqlite_registry.add(Note(text="a"))

    def run(program: Program, blocks: int | None = None) -> None:
        app = SessionMiddleware(BODIES[body](program), sqlite_registry, commit_on=commit_on)
        Server().run(app, make_environ("POST"), blocks=blocks)

    run(Program(early))
    run(Program(early), blocks=1)
    with pytest.raises(AppError):
        run(Program(early, late=fail))

    assert caplog.record_tuples == []


@pytest.mark.parametrize(
    ("method", "work", "logged"),
    [
        pytest.param("POST", insert_by_text, True, id="textual SQL in a POST"),
        pytest.param("GET", add_one, True, id="an object that is added in a GET"),
        pytest.param("GET", change_one, True, id="an object that is changed in a GET"),
        pytest.param("GET", delete_one, True, id="an object that is deleted in a GET"),
        pytest.param("GET", read, False, id="a GET that reads"),
        pytest.param("POST", idle, False, id="a POST without a transaction"),
    ],
)
def test_writes_that_a_veto_discards_are_logged(
    sqlite_registry: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
    method: str,
    work: Callable[[scoped_session[Session]], None],
    logged: bool,
) -> None:
    """One line says which request lost what it wrote, and what to call if that is wrong."""
    with session_scope(sqlite_registry):
        sqlite_registry.add(Note(id=1, text="a"))
    caplog.set_level(logging.DEBUG, "wsgi_dbsession")
    program = Program(lambda: work(sqlite_registry), status="404 Not Found")
    app = SessionMiddleware(BODIES["list body"](program), sqlite_registry)

    Server().run(app, make_environ(method, "/notes", SCRIPT_NAME="/app"))

    line = f"{method} /app/notes: what it wrote is rolled back because of its status; "
    line += "scope.keep() commits in spite of that"
    expected = [("wsgi_dbsession", logging.INFO, line)] if logged else []
    assert caplog.record_tuples == expected
