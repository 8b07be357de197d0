"""``released()`` in a response: across its steps, and with outcomes, hooks and threads."""

from __future__ import annotations

import contextvars
import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, select, text
from werkzeug.test import Client

from tests.support.models import Database, Note
from tests.support.moments import flush_note
from tests.support.wsgi import (
    NoClose,
    Server,
    ask,
    assert_nothing_left,
    drive,
    make_environ,
    make_registry,
)
from wsgi_dbsession import (
    Observer,
    Scope,
    SessionMiddleware,
    current_scope,
    session_scope,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("released")

NO_STATEMENT = "no statement may run in the released.. block at "


@pytest.fixture
def stocked(sqlite_registry: Registry, sqlite_database: Database) -> Registry:
    """A registry over a database with one note."""
    with session_scope(sqlite_registry):
        sqlite_registry.add(Note(text="there"))
    return sqlite_registry


def checked_out(registry: Registry) -> int:
    pool: Any = registry.session_factory.kw["bind"].pool
    count: int = pool.checkedout()
    return count


def stream(registry: Registry, work: Callable[[Note], object] = lambda _: None) -> Any:
    """An application that sends its second block from a released() block."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        note = registry.scalars(select(Note)).one()
        start_response("200 OK", [])
        yield b"one"
        with current_scope().released():
            yield b"two"
            work(note)
            yield b"three"
        note.text = "changed"
        yield registry.scalars(select(Note.text)).one().encode()

    return app


def test_the_connection_is_in_the_pool_while_the_generator_is_suspended(
    stocked: Registry, sqlite_database: Database
) -> None:
    """Each step finds the block as it was left."""

    def work(note: Note) -> None:
        with pytest.raises(RuntimeError, match="GET /path: " + NO_STATEMENT):
            stocked.scalar(text("SELECT 1"))
        assert note.text == "there"

    server = Server()
    blocks = SessionMiddleware(stream(stocked, work), stocked)(
        make_environ(path="/path"), server.start_response
    )
    held: list[int] = []
    body: list[bytes] = []
    for block in blocks:
        held.append(checked_out(stocked))
        body.append(block)
    blocks.close()  # type: ignore[attr-defined]

    assert held == [1, 0, 0, 1]
    assert body == [b"one", b"two", b"three", b"changed"]
    assert sqlite_database.notes() == ["changed"]


@pytest.mark.parametrize("blocks", [2, 3])
def test_a_client_that_leaves_in_the_block_is_rolled_back(
    stocked: Registry, sqlite_database: Database, blocks: int
) -> None:
    """The generator gets GeneratorExit in the block, and leaves it."""
    scopes: list[Scope] = []

    def work(note: Note) -> None:
        scopes.append(current_scope())
        note.text = "changed"

    app = SessionMiddleware(stream(stocked, work), stocked)

    Server().run(app, make_environ(), blocks=blocks)

    assert [(scope.outcome, scope.releases) for scope in scopes] == [("rollback", ())] * (
        blocks - 2
    )
    assert sqlite_database.notes() == ["there"]
    assert_nothing_left(stocked)


def test_a_response_that_is_dropped_in_the_block_leaves_nothing(stocked: Registry) -> None:
    """Without ``close()``, by the server."""
    app = SessionMiddleware(stream(stocked, lambda note: setattr(note, "text", "x")), stocked)
    blocks = iter(app(make_environ(), Server().start_response))
    assert [next(blocks) for _ in range(3)] == [b"one", b"two", b"three"]

    with pytest.warns(ResourceWarning, match="response dropped without close"):
        blocks = iter(())
    gc.collect()

    assert_nothing_left(stocked)


def test_an_outcome_may_come_in_the_block(stocked: Registry, sqlite_database: Database) -> None:
    """It needs a connection, which it gets; the application's statements are refused before it
    and after.
    """
    refused: list[str] = []

    def try_a_statement() -> None:
        try:
            stocked.scalar(text("SELECT 1"))
        except RuntimeError as error:
            refused.append(str(error))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        note = stocked.scalars(select(Note)).one()
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        with current_scope().released():
            note.text = "changed"
            try_a_statement()
            yield b"one"
            try_a_statement()
        yield stocked.scalars(select(Note.text)).one().encode()

    reply = ask(SessionMiddleware(app, stocked, commit_on="auto"))

    assert (reply.body, reply.errors) == (b"onechanged", [])
    assert len(refused) == 2
    assert sqlite_database.notes() == ["changed"]


def test_hooks_and_listeners_of_an_outcome_in_the_block_use_the_session(
    stocked: Registry, sqlite_database: Database
) -> None:
    """They are not in the block, even if the generator is."""
    listened: list[str] = []
    event.listen(
        stocked.session_factory,
        "before_commit",
        lambda session: listened.append(session.scalar(text("SELECT text FROM note"))),
    )

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        note = stocked.scalars(select(Note)).one()
        start_response("200 OK", [])
        scope = current_scope()
        scope.on_commit(flush_note, stocked, "by the hook")
        with scope.released():
            note.text = "changed"
            yield b"one"

    reply = ask(SessionMiddleware(app, stocked, commit_on="headers"))

    assert reply.errors == []
    assert listened[0] == "changed"
    assert sqlite_database.notes() == ["by the hook", "changed"]


def test_a_block_that_is_never_left_loses_nothing(
    stocked: Registry, sqlite_database: Database
) -> None:
    """A generator of the application that was suspended in it, and is still referred to."""
    kept: list[object] = []

    def released() -> Iterator[None]:
        with current_scope().released():
            yield

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        note = stocked.scalars(select(Note)).one()
        generator = released()
        next(generator)
        kept.append(generator)
        note.text = "changed"
        start_response("200 OK", [])
        return [b""]

    assert ask(SessionMiddleware(app, stocked)).errors == []

    assert sqlite_database.notes() == ["changed"]
    kept.clear()
    gc.collect()
    assert_nothing_left(stocked)


def test_an_error_in_the_block_is_the_error_of_the_request(
    stocked: Registry, sqlite_database: Database
) -> None:
    """The slow service has failed: nothing is committed."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        note = stocked.scalars(select(Note)).one()
        note_id = note.id
        with current_scope().released():
            note.text = "changed"
            raise TimeoutError(note_id)

    reply = ask(SessionMiddleware(app, stocked))

    assert [type(error) for error in reply.errors] == [TimeoutError]
    assert sqlite_database.notes() == ["there"]
    assert_nothing_left(stocked)


def test_a_swallowed_refusal_changes_nothing(
    sqlite_registry: Registry, sqlite_database: Database
) -> None:
    """The request goes on as if it had not asked, with its connection."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        sqlite_registry.execute(text("INSERT INTO note (text) VALUES ('kept')"))
        with pytest.raises(RuntimeError, match="POST /path: cannot release connections at "):
            current_scope().released().__enter__()
        start_response("201 Created", [])
        return [b""]

    assert drive(SessionMiddleware(app, sqlite_registry), "POST").status == "201 Created"

    assert sqlite_database.notes() == ["kept"]


def test_a_work_in_the_block_in_a_copied_context_is_refused(stocked: Registry) -> None:
    """``asyncio.to_thread`` and asgiref copy the context: the scope is the same there."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            stocked.scalar(text("SELECT 1"))
        except RuntimeError as error:
            errors.append(error)

    with session_scope(stocked) as scope:
        stocked.scalars(select(Note)).one()
        with scope.released():
            thread = threading.Thread(target=contextvars.copy_context().run, args=[work])
            thread.start()
            thread.join()

    assert [NO_STATEMENT.replace("..", "()") in str(error) for error in errors] == [True]


def test_a_block_in_a_copied_context_releases(stocked: Registry) -> None:
    """The thread that waits may be another one."""
    held: list[int] = []

    def work() -> None:
        with current_scope().released():
            held.append(checked_out(stocked))

    with session_scope(stocked):
        stocked.scalars(select(Note)).one()
        thread = threading.Thread(target=contextvars.copy_context().run, args=[work])
        thread.start()
        thread.join()
        assert stocked.scalar(text("SELECT 1")) == 1

    assert held == [0]


def test_the_scope_of_a_request_may_be_released_within_another(
    stocked: Registry, sqlite_database: Database
) -> None:
    """The Sessions of the inner one are its own."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stocked.scalars(select(Note)).one()
        with session_scope(stocked), environ["wsgi_dbsession.scope"].released():
            stocked.add(Note(text="inner"))
            stocked.flush()
            assert checked_out(stocked) == 1
        start_response("200 OK", [])
        return [b""]

    assert ask(SessionMiddleware(app, stocked)).errors == []
    assert sqlite_database.notes() == ["inner", "there"]


def test_a_request_in_the_block_is_a_request_like_any_other(stocked: Registry) -> None:
    """The slow service may be the application itself, called in-process: with a pool of one."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        note = stocked.scalars(select(Note)).one()
        if environ["PATH_INFO"] == "/outer":
            with current_scope().released():
                answer = Client(wrapped).get("/inner").text
            assert note.text == "there"
        else:
            note.text, answer = "by inner", "answer"
        start_response("200 OK", [])
        return [answer.encode()]

    wrapped = SessionMiddleware(app, stocked)

    assert Client(wrapped).get("/outer").text == "answer"


def test_it_is_one_outcome_with_one_hook(stocked: Registry) -> None:
    """The end of the first transaction is none: no observer and no hook sees it."""
    seen: list[str] = []

    class Witness(Observer):
        def settled(self, scope: Scope) -> None:
            seen.append(f"{scope.outcome}, {scope.reason}")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scope = current_scope()
        scope.on_commit(seen.append, "hook")
        stocked.scalars(select(Note)).one()
        with scope.released():
            assert scope.outcome is None
        start_response("200 OK", [])
        return NoClose([b""])

    ask(SessionMiddleware(app, stocked, observers=[Witness()]))

    assert seen == ["hook", "commit, complete"]


def test_a_veto_discards_what_comes_after_the_block(
    stocked: Registry, sqlite_database: Database
) -> None:
    """The new transaction has the outcome of the scope."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        note = stocked.scalars(select(Note)).one()
        with current_scope().released():
            pass
        note.text = "changed"
        start_response("502 Bad Gateway", [])
        return [b""]

    ask(SessionMiddleware(app, stocked))

    assert sqlite_database.notes() == ["there"]


def test_a_scope_that_is_over_holds_nothing(sqlite_registry: Registry) -> None:
    """Whoever kept it may ask it."""
    other = make_registry(sqlite_registry.session_factory.kw["bind"])
    with session_scope(other) as scope:
        other.scalar(text("SELECT 1"))

    with scope.released():
        assert scope.releases

    assert_nothing_left(other)


def test_a_released_scope_is_freed_without_a_collection(stocked: Registry) -> None:
    """No cycle is left by the block: its Sessions go with their last reference."""
    gc.collect()
    gc.disable()
    try:
        with session_scope(stocked) as scope:
            session = weakref.ref(stocked())
            stocked.scalars(select(Note)).one()
            with scope.released():
                pass
            stocked.scalar(text("SELECT 1"))
        del scope
        assert session() is None
    finally:
        gc.enable()
