"""When: the moment of the outcome, step by step, and PEP 3333."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import sys
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session

from tests.models import Book, Database, Note
from tests.wsgi import (
    BLOCK_BY_BLOCK,
    BODIES,
    Program,
    Server,
    ask,
    assert_nothing_left,
    make_environ,
)
from wsgi_dbsession import Scope, SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from tests.wsgi import ExcInfo, Headers
    from wsgi_dbsession._response import CommitOn

MOMENTS: list[CommitOn] = ["complete", "headers", "close"]


def html() -> Headers:
    """Return new headers: a server may change the list."""
    return [("Content-Type", "text/html")]


class AppError(Exception):
    """The application's error."""


class Kill(BaseException):
    """What ends a greenlet from outside, in the manner of GreenletExit."""


def fail() -> None:
    raise AppError


def trace_commits(registry: scoped_session[Session], server: Server) -> None:
    """Write commits and rollbacks between what the server is told."""
    factory = registry.session_factory
    event.listen(factory, "after_commit", lambda _: server.trace.append("commit"))
    event.listen(factory, "after_rollback", lambda _: server.trace.append("rollback"))


# -- the moment -----------------------------------------------------------------------------------

COMMIT_FIRST = ["commit", "start 200", "block one", "block two", "end"]
COMMIT_LAST = ["start 200", "block one", "block two", "end", "commit"]
COMMIT_AT_THE_END = ["start 200", "block one", "block two", "commit", "end"]
COMMIT_BEFORE_THE_LAST_BLOCK = ["start 200", "block one", "commit", "block two", "end"]


def moment_of(commit_on: CommitOn, body: str) -> list[str]:
    if commit_on == "close":
        return COMMIT_LAST
    if commit_on == "headers" or body in {"list body", "tuple body", "file wrapper"}:
        return COMMIT_FIRST
    if body == "generator with a length":
        return COMMIT_BEFORE_THE_LAST_BLOCK
    return COMMIT_AT_THE_END


@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", BODIES)
def test_the_commit_comes_at_its_moment(
    sqlite_registry: scoped_session[Session], body: str, commit_on: CommitOn
) -> None:
    """Between which of the server's steps the commit is, for each kind of body."""
    server = Server()
    trace_commits(sqlite_registry, server)
    app = BODIES[body](Program(early=lambda: sqlite_registry.add(Note())))

    server.run(SessionMiddleware(app, sqlite_registry, commit_on=commit_on), make_environ())

    assert server.trace == moment_of(commit_on, body)


def one_block(program: Program, length: str | None = None) -> WSGIApplication:
    """Make an application with a body of one block, and code before and after it."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        program.early()
        headers = [("Content-Length", length)] if length is not None else []
        start_response(program.status, [*program.headers, *headers])
        yield b"one"
        program.last()

    return app


@pytest.mark.parametrize(
    ("method", "status", "length", "trace"),
    [
        pytest.param(
            "GET",
            "200 OK",
            "3",
            ["commit", "start 200", "block one", "commit", "end"],
            id="a block that is the whole body",
        ),
        pytest.param(
            "GET",
            "200 OK",
            " 3 ",
            ["commit", "start 200", "block one", "commit", "end"],
            id="a length with spaces",
        ),
        pytest.param(
            "GET",
            "200 OK",
            "2",
            ["commit", "start 200", "block one", "commit", "end"],
            id="a body longer than it should be",
        ),
        pytest.param(
            "GET",
            "200 OK",
            "4",
            ["start 200", "block one", "commit", "end"],
            id="a body shorter than it should be",
        ),
        pytest.param(
            "GET",
            "200 OK",
            "many",
            ["start 200", "block one", "commit", "end"],
            id="a length that is no number",
        ),
        pytest.param(
            "GET",
            "200 OK",
            None,
            ["start 200", "block one", "commit", "end"],
            id="no length",
        ),
        pytest.param(
            "GET",
            "200 OK",
            "0",
            ["commit", "start 200", "block one", "end"],
            id="a length of zero",
        ),
        pytest.param(
            "HEAD",
            "200 OK",
            "3",
            ["commit", "start 200", "block one", "end"],
            id="a HEAD request",
        ),
        pytest.param(
            "HEAD",
            "200 OK",
            None,
            ["commit", "start 200", "block one", "end"],
            id="a HEAD request without a length",
        ),
        pytest.param(
            "GET",
            "204 No Content",
            None,
            ["commit", "start 204", "block one", "end"],
            id="a status 204",
        ),
        pytest.param(
            "GET",
            "304 Not Modified",
            None,
            ["commit", "start 304", "block one", "end"],
            id="a status 304",
        ),
        pytest.param(
            "GET",
            "103 Early Hints",
            None,
            ["commit", "start 103", "block one", "end"],
            id="a status 1xx",
        ),
    ],
)
def test_the_commit_comes_before_the_client_has_all(
    sqlite_registry: scoped_session[Session],
    method: str,
    status: str,
    length: str | None,
    trace: list[str],
) -> None:
    """The last moment depends on what makes the response a whole one."""
    server = Server()
    trace_commits(sqlite_registry, server)

    def work() -> None:
        sqlite_registry.add(Note())

    program = Program(early=work, last=work, status=status)
    app = SessionMiddleware(one_block(program, length), sqlite_registry)

    server.run(app, make_environ(method))

    assert server.trace == trace


@pytest.mark.parametrize("commit_on", MOMENTS)
def test_an_empty_body_is_committed_before_its_start(
    sqlite_registry: scoped_session[Session], commit_on: CommitOn
) -> None:
    """A generator that yields nothing, such as the body of a redirect, is held to its end."""
    server = Server()
    trace_commits(sqlite_registry, server)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        sqlite_registry.add(Note())
        start_response("303 See Other", [("Location", "/")])
        yield from ()

    server.run(SessionMiddleware(app, sqlite_registry, commit_on=commit_on), make_environ())

    early = ["commit", "start 303", "end"]
    assert server.trace == (["start 303", "end", "commit"] if commit_on == "close" else early)


@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_body_that_the_server_does_not_ask_for_is_complete(
    database: Database, registry: scoped_session[Session], method: str, commit_on: CommitOn
) -> None:
    """A server may close the response to HEAD, or a 204, without iterating over it."""
    server = Server()
    trace_commits(registry, server)
    status = "200 OK" if method == "HEAD" else "204 No Content"
    program = Program(early=lambda: registry.add(Note(text="a")), status=status)
    app = SessionMiddleware(BODIES["unsized generator"](program), registry, commit_on=commit_on)

    server.run(app, make_environ(method), blocks=0)

    assert database.notes() == ["a"]
    early = ["commit", f"start {status[:3]}"]
    assert server.trace == (early[::-1] if commit_on == "close" else early)


def test_each_part_of_a_stream_has_an_outcome(
    database: Database, registry: scoped_session[Session]
) -> None:
    """With "headers", what comes after the start is a transaction of its own."""
    program = Program(
        early=lambda: registry.add(Note(text="early")),
        late=lambda: registry.add(Note(text="late")),
    )
    app = SessionMiddleware(BODIES["unsized generator"](program), registry, commit_on="headers")

    response = app(make_environ(), Server().start_response)
    assert database.notes() == ["early"]
    blocks = iter(response)
    assert next(blocks) == b"one"
    assert database.notes() == ["early"]
    assert next(blocks) == b"two"
    assert database.notes() == ["early"]
    assert list(blocks) == []
    assert database.notes() == ["early", "late"]
    response.close()  # type: ignore[attr-defined]


def flush_note(registry: scoped_session[Session], note: str) -> None:
    registry.add(Note(text=note))
    registry.flush()


@pytest.mark.parametrize("how", ["an error", "an early close"])
def test_a_stream_that_breaks_off_keeps_what_was_committed(
    database: Database, registry: scoped_session[Session], how: str
) -> None:
    """With "headers", the part before the start stays, and the part after it is rolled back."""
    scopes: list[Scope] = []

    def early() -> None:
        scopes.append(current_scope())
        flush_note(registry, "early")

    def late() -> None:
        flush_note(registry, "late")
        if how == "an error":
            raise AppError

    app = BODIES["unsized generator"](Program(early, late))
    app = SessionMiddleware(app, registry, commit_on="headers")

    if how == "an error":
        with pytest.raises(AppError):
            Server().run(app, make_environ())
    else:
        Server().run(app, make_environ(), blocks=2)

    (scope,) = scopes
    assert database.notes() == ["early"]
    assert scope.reason == ("error" if how == "an error" else "incomplete")


def test_an_error_after_the_last_block_comes_too_late(
    database: Database, registry: scoped_session[Session]
) -> None:
    """The client had all of the body, and its transaction stays; the error still propagates."""

    def last() -> None:
        flush_note(registry, "last")
        raise AppError

    program = Program(early=lambda: flush_note(registry, "early"), last=last)
    app = SessionMiddleware(BODIES["generator with a length"](program), registry)

    with pytest.raises(AppError):
        Server().run(app, make_environ())

    assert database.notes() == ["early"]


def test_a_client_that_goes_away_with_the_whole_body_changes_nothing(
    database: Database, registry: scoped_session[Session]
) -> None:
    """A body of known length is complete with its last block; what its close does is committed."""
    program = Program(
        early=lambda: flush_note(registry, "early"),
        closing=lambda: flush_note(registry, "closing"),
    )
    app = SessionMiddleware(BODIES["generator with a length"](program), registry)

    Server().run(app, make_environ(), blocks=2)

    assert database.notes() == ["closing", "early"]


def test_what_is_done_at_close_has_an_outcome(
    database: Database, registry: scoped_session[Session]
) -> None:
    """A transaction begun in the application's close() is committed, if the body was complete."""
    program = Program(closing=lambda: registry.add(Note(text="closing")))
    app = SessionMiddleware(BODIES["sized iterable"](program), registry)

    Server().run(app, make_environ())
    assert database.notes() == ["closing"]

    Server().run(app, make_environ(), blocks=1)
    assert database.notes() == ["closing"]


def test_no_connection_is_held_while_the_client_reads(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """After the outcome the connection is in the pool, though the response goes on."""
    pool: Any = sqlite_database.engine.pool
    program = Program(early=lambda: flush_note(sqlite_registry, "a"))
    app = SessionMiddleware(BODIES["generator with a length"](program), sqlite_registry)

    response = app(make_environ(), Server().start_response)
    blocks = iter(response)
    held = [pool.checkedout(), next(blocks), pool.checkedout(), next(blocks), pool.checkedout()]
    response.close()  # type: ignore[attr-defined]

    assert held == [1, b"one", 1, b"two", 0]


# -- a commit that fails --------------------------------------------------------------------------


def sorry(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer where the commit failed."""
    error = sys.exc_info()[1]
    start_response("503 Service Unavailable", [("Retry-After", "1")])
    return [f"{type(error).__name__} in {environ['PATH_INFO']}".encode()]


def sent_before_the_commit(commit_on: CommitOn, body: str) -> bytes:
    """Return what of the body the client has when the commit fails."""
    trace = moment_of(commit_on, body)
    sent = trace[: trace.index("commit")]
    return b"".join(step[6:].encode() for step in sent if step.startswith("block"))


@pytest.mark.parametrize("answer", [None, sorry], ids=["without an answer", "with commit_error"])
@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", BODIES)
def test_no_client_gets_a_whole_success_without_a_commit(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
    body: str,
    commit_on: CommitOn,
    answer: WSGIApplication | None,
) -> None:
    """The client sees a 500, the answer of commit_error, or a body that breaks off.

    Only with "close" does it see a whole success: that is the known price of it.
    """
    check_failing_commit(
        sqlite_database, sqlite_registry, caplog, body, commit_on=commit_on, answer=answer
    )


@pytest.mark.parametrize("answer", [None, sorry], ids=["without an answer", "with commit_error"])
@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize(
    "body", ["list body", "unsized generator", "generator with a length", "write()"]
)
def test_the_same_holds_on_postgres(
    postgres_database: Database,
    postgres_registry: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
    body: str,
    commit_on: CommitOn,
    answer: WSGIApplication | None,
) -> None:
    """A deferred foreign key fails in the commit there, too."""
    check_failing_commit(
        postgres_database, postgres_registry, caplog, body, commit_on=commit_on, answer=answer
    )


def check_failing_commit(
    database: Database,
    registry: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
    body: str,
    *,
    commit_on: CommitOn,
    answer: WSGIApplication | None,
) -> None:
    scopes: list[Scope] = []
    hooks: list[str] = []

    def early() -> None:
        scopes.append(scope := current_scope())
        scope.on_commit(lambda: hooks.append("commit"))
        scope.on_rollback(lambda: hooks.append("rollback"))
        registry.add_all([Note(text="lost"), Book(author_id=7)])

    answers: list[WSGIEnvironment] = []

    def note_and_answer(
        environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        assert answer is not None
        answers.append(environ)
        return answer(environ, start_response)

    program = Program(early)
    app = SessionMiddleware(
        BODIES[body](program),
        registry,
        commit_on=commit_on,
        commit_error=note_and_answer if answer else None,
    )

    reply = ask(app, "POST", "/books", SCRIPT_NAME="/app")

    sent = sent_before_the_commit(commit_on, body)
    if commit_on == "close":
        assert (reply.status, reply.body, reply.whole) == ("200 OK", b"onetwo", True)
    elif sent:
        assert (reply.status, reply.body, reply.whole) == ("200 OK", sent, False)
    elif answer is None:
        assert reply.status == "500 Internal Server Error"
    else:
        assert reply.status == "503 Service Unavailable"
        assert (reply.body, reply.whole) == (b"IntegrityError in /books", True)
        assert reply.headers["Retry-After"] == "1"
    answered = answer is not None and not sent
    assert len(answers) == answered
    assert [type(error) for error in reply.errors] == ([] if answered else [IntegrityError])

    (scope,) = scopes
    assert (scope.outcome, scope.reason) == ("rollback", "commit failed")
    assert hooks == ["rollback"]
    assert database.notes() == []
    assert program.closed == (body in BLOCK_BY_BLOCK)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("wsgi_dbsession", logging.ERROR)
    assert record.getMessage().startswith(
        "POST /app/books: the commit failed, everything is rolled back: "
    )
    assert "foreign key" in record.getMessage().lower()
    assert record.exc_info is not None
    assert record.exc_info[0] is IntegrityError
    assert_nothing_left(registry)


def writing_once(program: Program) -> WSGIApplication:
    """Make an application that writes a body of known length with one call of write()."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        program.early()
        start_response(program.status, [*program.headers, ("Content-Length", "3")])(b"one")
        return []

    return app


def writing_nothing(program: Program) -> WSGIApplication:
    """Make an application that writes an empty block only, to have the headers sent."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(program.status, program.headers)(b"")
        program.early()
        return []

    return app


def empty_generator(program: Program) -> WSGIApplication:
    """Make an application whose body has no block at all."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        program.early()
        start_response(program.status, program.headers)
        yield from ()

    return app


def first_block_empty(program: Program) -> WSGIApplication:
    """Make an application that yields an empty block, as PEP 3333 recommends to middleware."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response(program.status, program.headers)
        yield b""
        program.early()

    return app


@pytest.mark.parametrize("answer", [None, sorry], ids=["without an answer", "with commit_error"])
@pytest.mark.parametrize(
    ("make", "method", "status"),
    [
        pytest.param(BODIES["unsized generator"], "HEAD", "200 OK", id="HEAD"),
        pytest.param(BODIES["write()"], "HEAD", "200 OK", id="HEAD and write()"),
        pytest.param(BODIES["list body"], "HEAD", "200 OK", id="HEAD and a list"),
        pytest.param(BODIES["unsized generator"], "GET", "204 No Content", id="204"),
        pytest.param(BODIES["unsized generator"], "GET", "304 Not Modified", id="304"),
        pytest.param(empty_generator, "GET", "303 See Other", id="an empty generator"),
        pytest.param(empty_generator, "GET", "200 OK", id="an empty body"),
        pytest.param(writing_once, "GET", "200 OK", id="a written body of known length"),
        pytest.param(lambda p: one_block(p, "3"), "GET", "200 OK", id="a block of known length"),
        pytest.param(lambda p: one_block(p, "0"), "GET", "200 OK", id="a length of zero"),
        pytest.param(first_block_empty, "GET", "200 OK", id="an empty block first"),
        pytest.param(writing_nothing, "GET", "200 OK", id="an empty block written"),
    ],
)
def test_a_failed_commit_is_answered_where_nothing_was_sent(
    sqlite_registry: scoped_session[Session],
    make: Callable[[Program], WSGIApplication],
    method: str,
    status: str,
    answer: WSGIApplication | None,
) -> None:
    """A response that is whole with its headers, or its first block, is held until the commit."""
    program = Program(lambda: sqlite_registry.add(Book(author_id=7)), status=status)
    app = SessionMiddleware(make(program), sqlite_registry, commit_error=answer)
    server = Server()

    if answer is None:
        with pytest.raises(IntegrityError):
            server.run(app, make_environ(method))
        assert b"".join(server.written) == b""
    else:
        server.run(app, make_environ(method))
        assert server.starts[-1][0] == "503 Service Unavailable"
        assert b"".join(server.written) == b"IntegrityError in /"
    if make not in (first_block_empty, writing_nothing):
        assert len(server.starts) == (answer is not None)


def test_a_commit_that_fails_in_close_raises(
    sqlite_registry: scoped_session[Session],
) -> None:
    """By then the response is the client's, and there is nothing to answer with."""
    program = Program(lambda: sqlite_registry.add(Book(author_id=7)))
    app = SessionMiddleware(
        BODIES["unsized generator"](program),
        sqlite_registry,
        commit_on="close",
        commit_error=sorry,
    )
    server = Server()

    with pytest.raises(IntegrityError):
        server.run(app, make_environ())

    assert [start[0] for start in server.starts] == ["200 OK"]


def test_the_start_is_known_when_the_call_returns(
    sqlite_registry: scoped_session[Session],
) -> None:
    """For servers that do not wait for the first block, whatever the application returns."""
    for body in BODIES:
        server = Server()
        program = Program(lambda: flush_note(sqlite_registry, "a"))
        app = SessionMiddleware(BODIES[body](program), sqlite_registry)

        response = app(make_environ(), server.start_response)

        assert [start[0] for start in server.starts] == ["200 OK"]
        if (close := getattr(response, "close", None)) is not None:
            close()


@pytest.mark.parametrize("body", ["list body", "unsized generator"])
def test_the_answer_to_a_failed_commit_is_closed(
    sqlite_registry: scoped_session[Session], body: str
) -> None:
    """The iterable of commit_error is the response now: all of it is sent, and it is closed."""
    apology = Program(status="503 Service Unavailable", blocks=(b"so", b"rry"))
    program = Program(lambda: sqlite_registry.add(Book(author_id=7)))
    app = one_block(program, "3") if body == "unsized generator" else BODIES[body](program)
    app = SessionMiddleware(
        app, sqlite_registry, commit_error=BODIES["generator application"](apology)
    )

    reply = ask(app)

    assert (reply.status, reply.body) == ("503 Service Unavailable", b"sorry")
    assert reply.errors == []
    assert apology.closed == 1


def test_the_answer_may_have_no_body(sqlite_registry: scoped_session[Session]) -> None:
    """An empty answer in place of a generator is the end of the body."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("503 Service Unavailable", [])
        return []

    program = Program(lambda: sqlite_registry.add(Book(author_id=7)))
    app = SessionMiddleware(one_block(program, "3"), sqlite_registry, commit_error=answer)

    reply = ask(app)

    assert (reply.status, reply.body, reply.errors) == ("503 Service Unavailable", b"", [])


def test_the_answer_may_pass_the_error_on(sqlite_registry: scoped_session[Session]) -> None:
    """It may give exc_info to start_response as any error page does."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("503 Service Unavailable", [], sys.exc_info())
        return [b"sorry"]

    program = Program(lambda: sqlite_registry.add(Book(author_id=7)))
    app = SessionMiddleware(BODIES["list body"](program), sqlite_registry, commit_error=answer)
    server = Server()

    server.run(app, make_environ())

    (start,) = server.starts
    assert start[2] is not None
    assert isinstance(start[2][1], IntegrityError)
    assert server.written == [b"sorry"]


def test_an_interrupted_commit_is_not_answered(
    sqlite_registry: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """A greenlet that is killed in the commit has nobody to answer to; the log has the request."""

    def interrupt(_: Session) -> None:
        raise Kill

    event.listen(sqlite_registry.session_factory, "before_commit", interrupt)
    program = Program(lambda: sqlite_registry.add(Note()))
    app = SessionMiddleware(BODIES["list body"](program), sqlite_registry, commit_error=sorry)
    server = Server()

    with pytest.raises(Kill):
        server.run(app, make_environ("POST", "/notes"))

    assert server.starts == []
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("POST /notes: ")
    assert "nobody knows if it took place" in record.getMessage()


def test_an_error_of_the_application_is_not_answered(
    sqlite_registry: scoped_session[Session],
) -> None:
    """commit_error is for commits that fail; what the application raises reaches the server."""
    app = BODIES["list body"](Program(fail))

    with pytest.raises(AppError):
        Server().run(SessionMiddleware(app, sqlite_registry, commit_error=sorry), make_environ())


@pytest.mark.parametrize("commit_on", ["complete", "headers"])
def test_a_commit_that_failed_in_write_cannot_become_a_success(
    sqlite_database: Database, sqlite_registry: scoped_session[Session], commit_on: CommitOn
) -> None:
    """An application that catches the error out of write() and goes on fails all the same."""
    hooks: list[str] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        sqlite_registry.add(Book(author_id=7))
        write = start_response("200 OK", [("Content-Length", "3")])
        with pytest.raises(IntegrityError):
            write(b"one")
        current_scope().on_commit(lambda: hooks.append("commit"))
        flush_note(sqlite_registry, "after it")
        return [b"one"]

    server = Server()

    with pytest.raises(IntegrityError):
        server.run(SessionMiddleware(app, sqlite_registry, commit_on=commit_on), make_environ())

    assert (server.starts, server.written, hooks) == ([], [], [])
    assert sqlite_database.notes() == []


@pytest.mark.parametrize("commit_on", ["complete", "headers"])
def test_an_application_may_answer_a_commit_that_failed_in_write(
    sqlite_registry: scoped_session[Session], commit_on: CommitOn
) -> None:
    """It learns of the failure where it writes, and its own error page goes out."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        sqlite_registry.add(Book(author_id=7))
        write = start_response("200 OK", [("Content-Length", "3")])
        try:
            write(b"one")
        except IntegrityError:
            start_response("409 Conflict", [], sys.exc_info())
            return [b"taken"]
        raise AssertionError("the commit did not fail")

    reply = ask(SessionMiddleware(app, sqlite_registry, commit_on=commit_on))

    assert (reply.status, reply.body, reply.errors) == ("409 Conflict", b"taken", [])


class BrokenFile(io.BytesIO):
    """A file that cannot be closed."""

    broken = True

    def close(self) -> None:
        """Fail, once."""
        if self.broken:
            self.broken = False
            raise AppError
        super().close()


def broken_file_app(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        program.early()
        start_response(program.status, program.headers)
        wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](BrokenFile(b"one"))
        return wrapped

    return app


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(broken_file_app, id="a file"),
        pytest.param(BODIES["generator with a length"], id="a generator"),
    ],
)
def test_the_failure_of_the_commit_beats_that_of_the_close(
    sqlite_registry: scoped_session[Session], make: Callable[[Program], WSGIApplication]
) -> None:
    """The first error is the one that propagates, though closing the body fails, too."""
    program = Program(lambda: sqlite_registry.add(Book(author_id=7)), closing=fail)

    with pytest.raises(IntegrityError):
        Server().run(SessionMiddleware(make(program), sqlite_registry), make_environ())


def test_a_start_that_the_server_refuses_closes_the_body(
    sqlite_registry: scoped_session[Session],
) -> None:
    """The server's error propagates, and a file that it never got to see is closed."""
    file = BrokenFile(b"one")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](file)
        return wrapped

    def refuse(status: str, headers: Headers, exc_info: ExcInfo = None, /) -> Any:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        SessionMiddleware(app, sqlite_registry)(make_environ(), refuse)

    assert not file.broken


@pytest.mark.parametrize("body", ["unsized generator", "generator application", "sized iterable"])
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_an_error_in_close_propagates_and_rolls_back(
    database: Database, registry: scoped_session[Session], body: str, status: str
) -> None:
    """Where the work is still undecided, the error of the application's close decides it."""
    scopes: list[Scope] = []

    def early() -> None:
        scopes.append(current_scope())
        registry.add(Note(text="a"))

    app = BODIES[body](Program(early, closing=fail, status=status))
    app = SessionMiddleware(app, registry, commit_on="close")

    with pytest.raises(AppError):
        Server().run(app, make_environ(), blocks=1)

    (scope,) = scopes
    assert (scope.outcome, scope.reason) == ("rollback", "error")
    assert database.notes() == []


# -- PEP 3333 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", BODIES)
def test_the_validator_has_no_complaint_on_either_side(
    sqlite_registry: scoped_session[Session], body: str, commit_on: CommitOn, method: str
) -> None:
    """wsgiref.validate is silent, outside and inside of the middleware."""
    program = Program(early=current_scope)
    app = SessionMiddleware(validator(BODIES[body](program)), sqlite_registry, commit_on=commit_on)

    reply = ask(validator(app), method)

    assert reply.errors == []
    assert (reply.status, reply.headers["Content-Type"]) == ("200 OK", "a/b")
    if method == "GET":
        assert reply.body == b"onetwo"


@pytest.mark.parametrize("body", ["list body", "unsized generator", "write()"])
def test_the_validator_has_no_complaint_about_an_answer(
    sqlite_registry: scoped_session[Session], body: str
) -> None:
    """Nor about the response of commit_error."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"sorry"]

    program = Program(lambda: sqlite_registry.add(Book(author_id=7)))
    app = one_block(program, "3") if body == "unsized generator" else BODIES[body](program)
    app = SessionMiddleware(
        validator(app), sqlite_registry, commit_on="headers", commit_error=validator(answer)
    )

    reply = ask(validator(app))

    assert (reply.status, reply.body, reply.errors) == ("503 Service Unavailable", b"sorry", [])


@pytest.mark.parametrize("body", ["list body", "tuple body", "file wrapper"])
def test_a_finished_body_reaches_the_server_unwrapped(
    sqlite_registry: scoped_session[Session], body: str
) -> None:
    """The very same object, so that the server's own fast paths stay."""
    given: list[Iterable[bytes]] = []
    inner = BODIES[body](Program())

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        given.append(inner(environ, start_response))
        return given[0]

    wrapped = SessionMiddleware(app, sqlite_registry)

    assert wrapped(make_environ(), Server().start_response) is given[0]
    assert ask(SessionMiddleware(BODIES[body](Program()), sqlite_registry)).body == b"onetwo"


def test_a_server_adds_the_length_of_a_single_block(
    sqlite_registry: scoped_session[Session],
) -> None:
    """That is the fast path of wsgiref, and of most servers."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", html())
        return [b"one"]

    assert ask(SessionMiddleware(app, sqlite_registry)).headers["Content-Length"] == "3"


def call_file_wrapper(file: io.BytesIO, size: int = 0) -> Iterable[bytes]:
    """Return what uWSGI's wrapper does: the file itself."""
    return file


def generate_file(file: io.BytesIO, size: int = 8192) -> Iterator[bytes]:
    """Return a generator, as a server may whose wrapper is a function."""
    yield from FileWrapper(file, size)


@pytest.mark.parametrize(
    ("file_wrapper", "unwrapped"),
    [
        pytest.param(FileWrapper, True, id="a class"),
        pytest.param(call_file_wrapper, True, id="a function that returns the file"),
        pytest.param(generate_file, False, id="a function that returns a generator"),
        pytest.param(None, False, id="none, and the application has its own"),
    ],
)
def test_the_file_wrapper_of_the_server_may_be_any_callable(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    file_wrapper: Any,
    unwrapped: bool,
) -> None:
    """PEP 3333 asks for a callable; its result is unwrapped where no code is left to run."""
    given: list[Iterable[bytes]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        flush_note(sqlite_registry, "a")
        start_response("200 OK", [])
        wrap = environ.get("wsgi.file_wrapper", FileWrapper)
        given.append(wrap(io.BytesIO(b"one"), 8192))
        return given[0]

    environ = make_environ(**{"wsgi.file_wrapper": file_wrapper})
    if file_wrapper is None:
        del environ["wsgi.file_wrapper"]

    response = SessionMiddleware(app, sqlite_registry)(environ, Server().start_response)

    assert (response is given[0]) is unwrapped
    assert (sqlite_database.notes() == ["a"]) is unwrapped
    assert b"".join(response) == b"one"
    response.close()  # type: ignore[attr-defined]
    assert sqlite_database.notes() == ["a"]


@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", ["list body", "unsized generator", "generator application"])
def test_an_error_page_replaces_a_start_that_was_not_sent(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    body: str,
    commit_on: CommitOn,
) -> None:
    """exc_info before the headers are sent: the client gets the error page, the work is vetoed."""

    def page(start_response: StartResponse) -> Iterator[bytes]:
        try:
            raise AppError
        except AppError:
            start_response("500 Sorry", html(), sys.exc_info())
        yield b"sorry"

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        flush_note(sqlite_registry, "a")
        start_response("200 OK", html())
        blocks = page(start_response)
        return list(blocks) if body == "list body" else blocks

    def generator_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        yield from app(environ, start_response)

    wrapped = generator_app if body == "generator application" else app

    reply = ask(SessionMiddleware(wrapped, sqlite_registry, commit_on=commit_on))

    assert (reply.status, reply.body, reply.errors) == ("500 Sorry", b"sorry", [])
    assert sqlite_database.notes() == []


def test_the_length_is_that_of_the_last_start(sqlite_registry: scoped_session[Session]) -> None:
    """An error page with another length is complete with that."""
    server = Server()
    trace_commits(sqlite_registry, server)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        sqlite_registry.add(Note())
        write = start_response("200 OK", [("Content-Length", "100")])
        write(b"")
        try:
            raise AppError
        except AppError:
            start_response("200 OK", [("Content-Length", "3")], sys.exc_info())
        yield b"one"

    server.run(SessionMiddleware(app, sqlite_registry), make_environ())

    assert server.trace == ["start 200", "block ", "start 200", "commit", "block one", "end"]


def test_an_error_after_the_start_was_sent_is_raised_by_the_server(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """exc_info after the headers were sent comes back out of start_response, and rolls back."""
    raised: list[bool] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        flush_note(sqlite_registry, "a")
        start_response("200 OK", html())
        yield b"one"
        try:
            raise AppError
        except AppError:
            try:
                start_response("500 Sorry", html(), sys.exc_info())
            except AppError:
                raised.append(True)
                raise
        yield b"sorry"

    reply = ask(SessionMiddleware(app, sqlite_registry))

    assert raised == [True]
    assert (reply.status, reply.body, reply.whole) == ("200 OK", b"one", False)
    assert [type(error) for error in reply.errors] == [AppError]
    assert sqlite_database.notes() == []


@pytest.mark.parametrize("commit_on", MOMENTS)
def test_a_second_start_without_an_error_is_refused(
    sqlite_database: Database, sqlite_registry: scoped_session[Session], commit_on: CommitOn
) -> None:
    """PEP 3333 calls it a fatal error; the work is lost, whoever catches that."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        flush_note(sqlite_registry, "a")
        start_response("200 OK", html())
        with pytest.raises(AssertionError, match="a second time without exc_info"):
            start_response("404 Not Found", html())
        return []

    server = Server()

    server.run(SessionMiddleware(app, sqlite_registry, commit_on=commit_on), make_environ())

    assert [status for status, _, _ in server.starts] == ["200 OK"]
    assert sqlite_database.notes() == []


def start_after_the_first_block(
    environ: WSGIEnvironment, start_response: StartResponse
) -> Iterator[bytes]:
    yield b""
    start_response("200 OK", html())
    yield b"one"


def no_start_and_a_list(
    environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    return [b"one"]


def no_start_and_a_generator(
    environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    return (block for block in [b"one"])


def no_start_and_no_block(
    environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    return (block for block in list[bytes]())


@pytest.mark.parametrize("doomed", [False, True], ids=["", "doomed"])
@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize(
    "late",
    [
        pytest.param(start_after_the_first_block, id="after the first block"),
        pytest.param(no_start_and_a_list, id="never, and a list"),
        pytest.param(no_start_and_a_generator, id="never, and a generator"),
        pytest.param(no_start_and_no_block, id="never, and an empty generator"),
    ],
)
def test_a_body_without_a_start_is_refused(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    late: WSGIApplication,
    commit_on: CommitOn,
    doomed: bool,
) -> None:
    """start_response must have been called before the first block; the work is rolled back."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        flush_note(sqlite_registry, "a")
        if doomed:
            current_scope().doom()
        return late(environ, start_response)

    server = Server()

    with pytest.raises(AssertionError, match="has not called start_response"):
        server.run(SessionMiddleware(app, sqlite_registry, commit_on=commit_on), make_environ())

    assert server.starts == []
    assert sqlite_database.notes() == []


@pytest.mark.parametrize("commit_on", MOMENTS)
def test_blocks_are_handed_on_as_they_come(
    sqlite_registry: scoped_session[Session], commit_on: CommitOn
) -> None:
    """One block for one block, also empty ones, so that the server's loop keeps its pace."""
    blocks = [b"", b"one", b"", b"", b"two", b""]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", html())
        for block in blocks:
            current_scope()
            yield block

    server = Server()

    server.run(SessionMiddleware(app, sqlite_registry, commit_on=commit_on), make_environ())

    assert server.written == blocks


def test_written_blocks_come_before_the_others(
    sqlite_registry: scoped_session[Session],
) -> None:
    """write() hands on at once, and a body may follow."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        write = start_response("200 OK", html())
        write(b"written")
        yield b"one"
        write(b"between")
        yield b"two"

    server = Server()

    server.run(SessionMiddleware(app, sqlite_registry), make_environ())

    assert server.written == [b"written", b"one", b"between", b"two"]
    assert len(server.starts) == 1


class Counted:
    """A body that counts how often it is closed."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.blocks = iter(blocks)
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return self.blocks

    def close(self) -> None:
        """Count."""
        self.closed += 1


def break_off() -> Iterator[bytes]:
    yield b"one"
    raise AppError


@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("times", [1, 2], ids=["a close", "a second close"])
@pytest.mark.parametrize(
    ("make", "asked"),
    [
        pytest.param(lambda: [b"one"], 0, id="not iterated over"),
        pytest.param(lambda: [b"one", b"two"], 1, id="of a client that goes away"),
        pytest.param(lambda: [b"one"], 2, id="iterated over to its end"),
        pytest.param(list, 1, id="empty"),
        pytest.param(break_off, 2, id="that raises"),
    ],
)
def test_the_body_is_closed_once(
    sqlite_registry: scoped_session[Session],
    make: Callable[[], Iterable[bytes]],
    asked: int,
    times: int,
    commit_on: CommitOn,
) -> None:
    """However it ends, and however often the server closes the response."""
    body = Counted(make())

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", html())
        return body

    wrapped = SessionMiddleware(app, sqlite_registry, commit_on=commit_on)
    response: Any = wrapped(make_environ(), Server().start_response)
    blocks = iter(response)
    for _ in range(asked):
        with contextlib.suppress(AppError):
            next(blocks, None)

    for _ in range(times):
        response.close()

    assert body.closed == 1
    assert list(blocks) == []


def test_a_body_that_cannot_be_iterated_over_is_closed(
    sqlite_registry: scoped_session[Session],
) -> None:
    """The error comes out of the step, and the scope ends."""

    class Body(Counted):
        def __iter__(self) -> Iterator[bytes]:
            raise AppError

    body = Body([])

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        flush_note(sqlite_registry, "a")
        start_response("200 OK", html())
        return body

    with pytest.raises(AppError):
        Server().run(SessionMiddleware(app, sqlite_registry), make_environ())

    assert body.closed == 1


@pytest.mark.parametrize("first", [AppError, Kill], ids=["an error", "an interruption"])
@pytest.mark.parametrize("second", [ValueError, SystemExit], ids=["an error", "an interruption"])
def test_the_first_error_beats_that_of_the_close(
    sqlite_registry: scoped_session[Session],
    first: type[BaseException],
    second: type[BaseException],
) -> None:
    """What the body raised propagates, not what closing it raised."""

    class Body(Counted):
        def close(self) -> None:
            super().close()
            raise second

    def break_off() -> Iterator[bytes]:
        flush_note(sqlite_registry, "a")
        yield b"one"
        raise first

    body = Body(break_off())

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", html())
        return body

    with pytest.raises(first):
        Server().run(SessionMiddleware(app, sqlite_registry), make_environ())

    assert body.closed == 1


# -- responses that are never closed --------------------------------------------------------------


@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", BLOCK_BY_BLOCK)
@pytest.mark.parametrize("asked", [0, 1])
def test_a_response_that_nobody_closes_leaves_nothing(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    body: str,
    commit_on: CommitOn,
    asked: int,
) -> None:
    """Once it is unreachable, its Session and connection are gone, without a collection."""
    program = Program(
        early=lambda: flush_note(sqlite_registry, "early"),
        late=lambda: flush_note(sqlite_registry, "late"),
    )
    app = SessionMiddleware(BODIES[body](program), sqlite_registry, commit_on=commit_on)
    environ = make_environ()
    gc.disable()
    try:
        response = iter(app(environ, Server().start_response))
        for _ in range(asked):
            next(response)
        del response

        assert_nothing_left(sqlite_registry)
    finally:
        gc.enable()

    committed = ["early"] if commit_on == "headers" else []
    assert sqlite_database.notes() == committed
    assert environ["wsgi_dbsession.scope"].environ is None


def test_a_caught_error_keeps_no_unclosed_response(
    sqlite_registry: scoped_session[Session],
) -> None:
    """One that lives on in a cycle keeps the frames of those who called; not the response."""

    def early() -> None:
        flush_note(sqlite_registry, "a")
        try:
            raise AppError
        except AppError as error:
            kept = error  # the error has this frame, and this frame has the error
        assert kept is not None

    app = SessionMiddleware(BODIES["unsized generator"](Program(early)), sqlite_registry)
    gc.disable()
    try:
        next(iter(app(make_environ(), Server().start_response)))

        assert_nothing_left(sqlite_registry)
    finally:
        gc.enable()


def test_a_thousand_unclosed_responses_leave_no_memory(
    sqlite_registry: scoped_session[Session],
) -> None:
    """Neither scopes nor Sessions pile up."""
    program = Program(early=lambda: sqlite_registry.scalar(text("SELECT 1")))
    app = SessionMiddleware(BODIES["unsized generator"](program), sqlite_registry)

    def alive() -> int:
        gc.collect()
        kinds = (Scope, Session)
        return sum(issubclass(type(each), kinds) for each in gc.get_objects())

    before = alive()
    for _ in range(1000):
        next(iter(app(make_environ(), Server().start_response)))

    assert alive() == before


def test_an_unclosed_response_in_a_cycle_is_collected(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """Where something made it reachable from itself, a collection ends it."""
    program = Program(early=lambda: flush_note(sqlite_registry, "a"))
    app = SessionMiddleware(BODIES["unsized generator"](program), sqlite_registry)
    cycle: list[object] = [response := iter(app(make_environ(), Server().start_response))]
    cycle.append(cycle)
    next(response)

    del response, cycle
    gc.collect()

    assert_nothing_left(sqlite_registry)
    assert sqlite_database.notes() == []
