"""PEP 3333: servers and applications notice nothing."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest

from tests.support.errors import AppError, Kill
from tests.support.models import Book, Database, Note
from tests.support.moments import MOMENTS, flush_note, html, one_block, trace_commits
from tests.support.wsgi import BODIES, Counted, Program, Server, ask, make_environ
from wsgi_dbsession import SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession._moment import CommitOn

pytestmark = pytest.mark.promise("PEP 3333")


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


@pytest.mark.promise("finished bodies")
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


@pytest.mark.promise("finished bodies")
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


@pytest.mark.parametrize("how", ["written", "yielded"])
def test_the_length_is_that_of_the_last_start(
    sqlite_registry: scoped_session[Session], how: str
) -> None:
    """An error page with another length is complete with that; an empty block sends no headers."""
    server = Server()
    trace_commits(sqlite_registry, server)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        sqlite_registry.add(Note())
        write = start_response("200 OK", [("Content-Length", "100")])
        if how == "written":
            write(b"")
        else:
            yield b""
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
    """PEP 3333 calls it a fatal error; swallowed, it is raised again before the start."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        flush_note(sqlite_registry, "a")
        start_response("200 OK", html())
        with pytest.raises(AssertionError, match="a second time without exc_info"):
            start_response("404 Not Found", html())
        return []

    server = Server()

    with pytest.raises(AssertionError, match="a second time without exc_info"):
        server.run(SessionMiddleware(app, sqlite_registry, commit_on=commit_on), make_environ())

    released = ["200 OK"] if commit_on == "close" else []
    assert [status for status, _, _ in server.starts] == released
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


def test_a_generator_that_never_began_is_closed(sqlite_registry: scoped_session[Session]) -> None:
    """With commit_on="close" it has not even begun, so no start is known."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", html())
        yield b"one"

    environ = make_environ()
    wrapped = SessionMiddleware(app, sqlite_registry, commit_on="close")
    response: Any = wrapped(environ, Server().start_response)
    scope = environ["wsgi_dbsession.scope"]

    response.close()

    assert (scope.environ, scope.outcome) == (None, None)


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


@pytest.mark.promise("first error")
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
