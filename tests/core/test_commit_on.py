"""What chooses the moment, and what cannot move it."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from tests.support.errors import AppError
from tests.support.models import Book, Database, Note
from tests.support.moments import MOMENTS, flush_note, moment_of, one_block, trace_commits
from tests.support.wsgi import (
    BLOCK_BY_BLOCK,
    BODIES,
    Program,
    Server,
    ask,
    assert_nothing_left,
    make_environ,
    make_registry,
    nothing,
)
from wsgi_dbsession import Scope, SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.wsgi import Headers
    from wsgi_dbsession._moment import CommitOn, Moment

    Registry = scoped_session[Session]

# -- commit_on as a callable ----------------------------------------------------------------------


@pytest.mark.promise("chosen moment")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("body", BODIES)
def test_a_callable_chooses_the_moment(
    sqlite_registry: Registry, body: str, moment: Moment
) -> None:
    """It is asked once per start, with environ, status and headers."""
    server = Server()
    trace_commits(sqlite_registry, server)
    asked: list[tuple[WSGIEnvironment, str, Headers]] = []

    def choose(environ: WSGIEnvironment, status: str, headers: Headers) -> Moment:
        asked.append((environ, status, headers))
        return moment

    environ = make_environ()
    program = Program(early=lambda: sqlite_registry.add(Note()))

    server.run(
        SessionMiddleware(BODIES[body](program), sqlite_registry, commit_on=choose), environ
    )

    assert server.trace == moment_of(moment, body)
    headers = program.headers if body != "generator with a length" else program.with_length()
    assert asked == [(environ, "200 OK", headers)]


@pytest.mark.promise("chosen moment")
@pytest.mark.parametrize(
    ("content_type", "moment"),
    [
        ("text/event-stream", "headers"),
        ("Text/Event-Stream; charset=utf-8", "headers"),
        ("text/html", "complete"),
        ("application/x; was=text/event-stream", "complete"),
        (None, "complete"),
    ],
)
@pytest.mark.parametrize("name", ["Content-Type", "content-type"])
def test_auto_is_for_server_sent_events(
    sqlite_registry: Registry, name: str, content_type: str | None, moment: Moment
) -> None:
    """A connection for hours is what no pool has; everything else is committed when complete."""
    server = Server()
    trace_commits(sqlite_registry, server)
    headers = [("X-First", "text/event-stream")]
    if content_type is not None:
        headers.append((name, content_type))
    program = Program(early=lambda: sqlite_registry.add(Note()), headers=headers)
    app = BODIES["unsized generator"](program)

    server.run(SessionMiddleware(app, sqlite_registry, commit_on="auto"), make_environ())

    assert server.trace == moment_of(moment, "unsized generator")


@pytest.mark.promise("chosen moment")
def test_a_new_start_is_a_new_choice(sqlite_database: Database, sqlite_registry: Registry) -> None:
    """An error page in place of a stream has its own moment."""
    asked: list[str] = []

    def choose(environ: WSGIEnvironment, status: str, headers: Headers) -> Moment:
        asked.append(status)
        return "close" if status == "200 OK" else "complete"

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        sqlite_registry.add(Note(text="a"))
        start_response("200 OK", [])
        try:
            raise AppError
        except AppError:
            start_response("201 Created", [], sys.exc_info())
        yield b"one"

    server = Server()
    trace_commits(sqlite_registry, server)
    server.run(SessionMiddleware(app, sqlite_registry, commit_on=choose), make_environ())

    assert server.trace == ["start 201", "block one", "commit", "end"]
    assert asked == ["201 Created"]
    assert sqlite_database.notes() == ["a"]


@pytest.mark.promise("chosen moment")
@pytest.mark.parametrize("value", ["auto", "later", None, True, []])
@pytest.mark.parametrize("body", BODIES)
def test_a_choice_that_is_none_is_an_error(
    sqlite_database: Database, sqlite_registry: Registry, body: str, value: Any
) -> None:
    """It is rolled back, and the message says what there is to choose from."""
    program = Program(lambda: flush_note(sqlite_registry, "a"))
    app = SessionMiddleware(BODIES[body](program), sqlite_registry, commit_on=lambda *_: value)
    server = Server()

    with pytest.raises(ValueError, match=r"commit_on must return one of \('complete', 'headers"):
        server.run(app, make_environ())

    assert server.starts == []
    assert sqlite_database.notes() == []
    assert_nothing_left(sqlite_registry)


@pytest.mark.promise("chosen moment")
@pytest.mark.parametrize("body", BODIES)
def test_a_choice_that_raises_is_an_error(
    sqlite_database: Database, sqlite_registry: Registry, body: str
) -> None:
    """The error propagates, and the work is rolled back."""

    def choose(environ: WSGIEnvironment, status: str, headers: Headers) -> Moment:
        raise AppError

    program = Program(lambda: flush_note(sqlite_registry, "a"))
    app = SessionMiddleware(BODIES[body](program), sqlite_registry, commit_on=choose)

    with pytest.raises(AppError):
        Server().run(app, make_environ())

    assert sqlite_database.notes() == []
    assert_nothing_left(sqlite_registry)


@pytest.mark.promise("chosen moment")
def test_there_is_no_choice_without_a_start(sqlite_registry: Registry) -> None:
    """An application that has not called start_response is told so, not the callable."""

    def choose(environ: WSGIEnvironment, status: str, headers: Headers) -> Moment:
        raise NotImplementedError

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return [b"one"]

    with pytest.raises(AssertionError, match="has not called start_response"):
        Server().run(SessionMiddleware(app, sqlite_registry, commit_on=choose), make_environ())


# -- what decides is read when the request begins -------------------------------------------------


@pytest.mark.promise("no false success", "no body")
@pytest.mark.parametrize(("before", "after"), [("GET", "HEAD"), ("HEAD", "GET")])
@pytest.mark.parametrize("body", BODIES)
def test_a_changed_method_does_not_move_the_moment(
    sqlite_database: Database, body: str, before: str, after: str
) -> None:
    """A method-override middleware lets the client choose it by a header."""

    def trace(*changes: str) -> list[str]:
        server = Server()
        registry = make_registry(sqlite_database.engine)
        trace_commits(registry, server)
        environ = make_environ(before)

        def early() -> None:
            environ["REQUEST_METHOD"] = (before, *changes)[-1]
            flush_note(registry, "a")

        app = SessionMiddleware(BODIES[body](Program(early)), registry)
        server.run(app, environ)
        return server.trace

    assert trace(after) == trace()


@pytest.mark.promise("no false success")
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(["3, 3"], id="a list"),
        pytest.param(["3", "6"], id="two, the smaller first"),
        pytest.param(["6", "3"], id="two, the smaller last"),
        pytest.param(["6, 3"], id="a list of two"),
        pytest.param(["+3"], id="a sign"),
        pytest.param(["3;a"], id="what follows"),
        pytest.param(["0x6"], id="another base"),
        pytest.param(["-6", "3"], id="a negative one"),
    ],
)
def test_the_smallest_length_is_the_one_that_counts(
    sqlite_registry: Registry, lengths: list[str]
) -> None:
    """No client can take the body for whole before the commit, whichever it goes by."""
    server = Server()
    trace_commits(sqlite_registry, server)
    headers = [("Content-Length", each) for each in lengths]
    program = Program(
        lambda: sqlite_registry.add(Note()), headers=[*headers, ("Content-Styles", "1")]
    )

    server.run(
        SessionMiddleware(BODIES["unsized generator"](program), sqlite_registry), make_environ()
    )

    assert server.trace == ["commit", "start 200", "block one", "block two", "end"]


# -- HEAD -----------------------------------------------------------------------------------------


@pytest.mark.promise("no body")
@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("asking", ["iterating", "asking for blocks"])
def test_head_of_an_endless_stream_is_answered(
    sqlite_database: Database, sqlite_registry: Registry, asking: str, commit_on: CommitOn
) -> None:
    """Its first block at most is made, and its close is called."""
    closed: list[bool] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            for number in itertools.count():
                sqlite_registry.add(Note(text=str(number)))
                yield b"block"
        finally:
            closed.append(True)

    wrapped = SessionMiddleware(app, sqlite_registry, commit_on=commit_on)
    if asking == "iterating":
        reply = ask(wrapped, "HEAD")
        assert (reply.status, reply.errors) == ("200 OK", [])
    else:
        response: Any = wrapped(make_environ("HEAD"), Server().start_response)
        assert next(response) == b"block"
        assert next(response, None) is None
        response.close()

    assert closed == [True]
    assert sqlite_database.notes() == ["0"]
    assert_nothing_left(sqlite_registry)


@pytest.mark.promise("no body", "no connection held")
def test_the_rest_of_a_head_holds_no_connection(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """The outcome has been, before the client has the headers."""
    pool: Any = sqlite_database.engine.pool
    program = Program(lambda: flush_note(sqlite_registry, "a"))
    app = SessionMiddleware(BODIES["unsized generator"](program), sqlite_registry)

    response: Any = app(make_environ("HEAD"), Server().start_response)

    assert sqlite_database.notes() == ["a"]
    assert pool.checkedout() == 0
    response.close()


# -- iterating ------------------------------------------------------------------------------------


@pytest.mark.promise("PEP 3333")
@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", BLOCK_BY_BLOCK)
def test_an_exhausted_response_stays_exhausted(
    sqlite_registry: Registry, body: str, commit_on: CommitOn
) -> None:
    """The application is not asked again, before the close and after it."""
    calls: list[str] = []
    program = Program(last=lambda: calls.append("last"))
    app = SessionMiddleware(BODIES[body](program), sqlite_registry, commit_on=commit_on)
    response: Any = app(make_environ(), Server().start_response)

    assert list(response) == [b"one", b"two"]
    for _ in range(3):
        assert next(response, None) is None
        assert list(response) == []
    response.close()
    assert next(response, None) is None
    assert calls == ["last"]


@pytest.mark.promise("PEP 3333")
def test_an_iterator_that_goes_on_after_its_end_is_not_asked(sqlite_registry: Registry) -> None:
    """One that breaks the rule of iterators gets no second outcome."""

    class Restarting:
        def __init__(self) -> None:
            self.blocks = [b"one", None, b"two"]

        def __iter__(self) -> Restarting:
            return self

        def __next__(self) -> bytes:
            block = self.blocks.pop(0)
            if block is None:
                raise StopIteration
            return block

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return Restarting()

    response: Any = SessionMiddleware(app, sqlite_registry)(
        make_environ(), Server().start_response
    )

    assert list(response) == [b"one"]
    assert list(response) == []
    response.close()


@pytest.mark.promise("PEP 3333")
@pytest.mark.parametrize("body", BODIES)
def test_a_status_of_bytes_is_refused_where_it_is_given(
    sqlite_database: Database, sqlite_registry: Registry, body: str
) -> None:
    """It would be an obscure error in the veto; the message names the type, and PEP 3333."""
    status: Any = b"200 OK"
    program = Program(lambda: flush_note(sqlite_registry, "a"), status=status)
    app = SessionMiddleware(BODIES[body](program), sqlite_registry)

    with pytest.raises(TypeError, match=r"status must be a str, got b'200 OK', see PEP 3333"):
        Server().run(app, make_environ())

    assert sqlite_database.notes() == []


# -- what an outcome begins -----------------------------------------------------------------------


@pytest.mark.promise("hooks", "no false success")
@pytest.mark.parametrize("body", ["list body", "generator with a length", "one block", "HEAD"])
def test_what_a_hook_writes_is_committed_before_the_client_has_all(
    sqlite_database: Database, sqlite_registry: Registry, body: str
) -> None:
    """The block that completes the body waits for it."""
    server = Server()
    trace_commits(sqlite_registry, server)

    def early() -> None:
        flush_note(sqlite_registry, "a")
        current_scope().on_commit(lambda: sqlite_registry.add(Note(text="hook")))

    program = Program(early)
    method = "HEAD" if body == "HEAD" else "GET"
    if body == "one block":
        app = one_block(program, "3")
    else:
        app = BODIES["unsized generator" if body == "HEAD" else body](program)

    server.run(SessionMiddleware(app, sqlite_registry), make_environ(method))

    last = max(number for number, step in enumerate(server.trace) if step == "commit")
    assert server.trace.count("commit") == 2
    assert server.trace.index("start 200") > last or body == "generator with a length"
    assert server.trace.index("end") > last
    if body == "generator with a length":
        assert server.trace.index("block two") > last
    assert sqlite_database.notes() == ["a", "hook"]


@pytest.mark.promise("hooks", "no false success")
@pytest.mark.parametrize("body", ["list body", "generator with a length"])
def test_a_hook_whose_write_fails_is_no_success(
    sqlite_database: Database, sqlite_registry: Registry, body: str
) -> None:
    """The first commit stays; the client sees an error, or a body that breaks off."""

    def early() -> None:
        flush_note(sqlite_registry, "a")
        current_scope().on_commit(lambda: sqlite_registry.add(Book(author_id=7)))

    reply = ask(SessionMiddleware(BODIES[body](Program(early)), sqlite_registry))

    assert [type(error) for error in reply.errors] == [IntegrityError]
    assert not (reply.whole and reply.status == "200 OK")
    assert sqlite_database.notes() == ["a"]


@pytest.mark.promise("no connection held")
@pytest.mark.parametrize("body", ["list body", "generator with a length", "file wrapper"])
def test_a_hook_that_only_reads_pins_no_connection(
    sqlite_database: Database, sqlite_registry: Registry, body: str
) -> None:
    """While a slow client reads the last block, it is back in the pool."""
    pool: Any = sqlite_database.engine.pool
    read: list[object] = []

    def early() -> None:
        flush_note(sqlite_registry, "a")
        current_scope().on_commit(lambda: read.extend(sqlite_registry.scalars(select(Note.text))))

    app = SessionMiddleware(BODIES[body](Program(early)), sqlite_registry)

    response: Any = app(make_environ(), Server().start_response)
    blocks = iter(response)
    next(blocks)
    next(blocks)
    assert pool.checkedout() == 0
    assert read == ["a"]
    getattr(response, "close", nothing)()


@pytest.mark.promise("the rest")
def test_hooks_of_a_stream_have_their_outcome_with_its_part(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """With "headers", what a hook of the first part writes is committed before the start."""
    scopes: list[Scope] = []

    def early() -> None:
        scopes.append(scope := current_scope())
        flush_note(sqlite_registry, "early")
        scope.on_commit(lambda: sqlite_registry.add(Note(text="hook")))

    def late() -> None:
        assert sqlite_database.notes() == ["early", "hook"]
        sqlite_registry.add(Note(text="late"))

    app = BODIES["unsized generator"](Program(early, late))
    Server().run(SessionMiddleware(app, sqlite_registry, commit_on="headers"), make_environ())

    assert scopes[0].outcome == "commit"
    assert sqlite_database.notes() == ["early", "hook", "late"]
