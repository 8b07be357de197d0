"""No client gets a whole success without its commit."""

from __future__ import annotations

import io
import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from tests.support.errors import AppError, Kill, fail
from tests.support.models import Book, Database, Note
from tests.support.moments import MOMENTS, flush_note, moment_of, one_block
from tests.support.wsgi import (
    BLOCK_BY_BLOCK,
    BODIES,
    Counted,
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
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.wsgi import ExcInfo, Headers
    from wsgi_dbsession._moment import CommitOn


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


@pytest.mark.promise("no false success")
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


@pytest.mark.promise("no false success")
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
    assert (scope.outcome, scope.reason) == ("rollback", "rolled back")
    assert hooks == ["rollback"]
    assert database.notes() == []
    assert program.closed == (body in BLOCK_BY_BLOCK)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("wsgi_dbsession", logging.ERROR)
    assert record.getMessage().startswith("POST /app/books: commit failed, rolled back: ")
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


@pytest.mark.promise("commit_error", "no body")
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


@pytest.mark.promise("close")
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


@pytest.mark.promise("commit_error")
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


@pytest.mark.promise("commit_error")
@pytest.mark.parametrize("body", ["list body", "unsized generator"])
def test_the_answer_is_closed_once(sqlite_registry: scoped_session[Session], body: str) -> None:
    """Though the client leaves before its end."""
    apology = Counted([b"so", b"rry"])

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("503 Service Unavailable", [])
        return apology

    program = Program(lambda: sqlite_registry.add(Book(author_id=7)))
    app = one_block(program, "3") if body == "unsized generator" else BODIES[body](program)
    response: Any = SessionMiddleware(app, sqlite_registry, commit_error=answer)(
        make_environ(), Server().start_response
    )

    assert next(iter(response)) == b"so"
    response.close()

    assert apology.closed == 1


@pytest.mark.promise("commit_error")
def test_the_answer_may_have_no_body(sqlite_registry: scoped_session[Session]) -> None:
    """An empty answer in place of a generator is the end of the body."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("503 Service Unavailable", [])
        return []

    program = Program(lambda: sqlite_registry.add(Book(author_id=7)))
    app = SessionMiddleware(one_block(program, "3"), sqlite_registry, commit_error=answer)

    reply = ask(app)

    assert (reply.status, reply.body, reply.errors) == ("503 Service Unavailable", b"", [])


@pytest.mark.promise("commit_error")
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


@pytest.mark.promise("commit_error")
def test_an_interrupted_commit_is_not_answered(
    sqlite_registry: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """A greenlet that is killed in the commit answers no client; the log has the request."""

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
    assert record.getMessage().startswith("POST /notes: commit failed, rolled back: ")


@pytest.mark.promise("commit_error")
def test_an_error_of_the_application_is_not_answered(
    sqlite_registry: scoped_session[Session],
) -> None:
    """commit_error is for commits that fail; what the application raises reaches the server."""
    app = BODIES["list body"](Program(fail))

    with pytest.raises(AppError):
        Server().run(SessionMiddleware(app, sqlite_registry, commit_error=sorry), make_environ())


@pytest.mark.promise("no false success", "write")
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


@pytest.mark.promise("first error")
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


@pytest.mark.promise("error")
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
