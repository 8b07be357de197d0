"""A failure that the application swallows, or a start that writes, is never a false success."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from tests.support.errors import AppError, Kill, interrupt_by
from tests.support.models import Book, Database
from tests.support.moments import MOMENTS, flush_note, one_block
from tests.support.wsgi import (
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
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.wsgi import ExcInfo, Headers
    from wsgi_dbsession._moment import CommitOn

    Registry = scoped_session[Session]


def veto_by_error(environ: WSGIEnvironment, status: str, headers: Headers) -> bool:
    raise AppError


# -- out of write() -------------------------------------------------------------------------------


def swallowing(registry: Registry, rest: Callable[[], Iterable[bytes]]) -> WSGIApplication:
    """Make an application that goes on after whatever write() raises, as some loggers do."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        flush_note(registry, "a")
        write = start_response("200 OK", [("Content-Length", "3")])
        with contextlib.suppress(BaseException):
            write(b"one")
        return rest()

    return app


def generate() -> Iterator[bytes]:
    yield b"one"


REST: dict[str, Callable[[], Iterable[bytes]]] = {
    "an empty list": list,
    "the body again": lambda: [b"one"],
    "a generator": generate,
    "an empty generator": lambda: iter(()),
}


@pytest.mark.promise("swallowed", "no false success")
@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("commit_on", ["complete", "headers"])
@pytest.mark.parametrize("failing", ["the veto", "a listener", "a hook that is interrupted"])
def test_a_failure_swallowed_out_of_write_is_no_success(
    sqlite_database: Database,
    sqlite_registry: Registry,
    rest: str,
    commit_on: CommitOn,
    failing: str,
) -> None:
    """Whatever failed at the outcome fails the response at the next release."""
    veto = None
    if failing == "the veto":
        veto = veto_by_error
    elif failing == "a listener":
        event.listen(sqlite_registry.session_factory, "before_commit", interrupt_by_event)
    app = swallowing(sqlite_registry, REST[rest])
    if failing == "a hook that is interrupted":
        app = with_hook(app)
    wrapped = SessionMiddleware(app, sqlite_registry, commit_on=commit_on, commit_veto=veto)
    server = Server()

    with pytest.raises((AppError, Kill)):
        server.run(wrapped, make_environ())

    assert (server.starts, server.written) == ([], [])
    assert sqlite_database.notes() == (["a"] if failing.startswith("a hook") else [])
    assert_nothing_left(sqlite_registry)


def interrupt_by_event(_: object) -> None:
    raise AppError


def with_hook(app: WSGIApplication) -> WSGIApplication:
    def hooking(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        current_scope().on_commit(interrupt_by(Kill()))
        return app(environ, start_response)

    return hooking


@pytest.mark.promise("swallowed")
def test_an_error_page_may_follow_a_swallowed_failure(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """The client learns of the failure by it, so it is let through."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        flush_note(sqlite_registry, "a")
        write = start_response("200 OK", [("Content-Length", "3")])
        try:
            write(b"one")
        except AppError:
            start_response("500 Internal Server Error", [], sys.exc_info())
        return [b"sorry"]

    reply = ask(SessionMiddleware(app, sqlite_registry, commit_veto=veto_by_error))

    assert (reply.status, reply.body) == ("500 Internal Server Error", b"sorry")
    assert reply.errors == []
    assert sqlite_database.notes() == []


@pytest.mark.promise("swallowed", "no false success")
def test_a_failure_between_two_blocks_cuts_the_body(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """The start and a block are gone by then."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        write = start_response("200 OK", [("Content-Length", "9")])
        yield b"one"
        flush_note(sqlite_registry, "a")
        with contextlib.suppress(AppError):
            write(b"twotwo")
        yield b"twotwo"

    wrapped = SessionMiddleware(app, sqlite_registry, commit_veto=veto_by_error)
    reply = ask(wrapped)

    assert (reply.whole, reply.body) == (False, b"one")
    assert [type(error) for error in reply.errors] == [AppError]
    assert sqlite_database.notes() == []


# -- a second start -------------------------------------------------------------------------------


@pytest.mark.promise("swallowed", "no false success")
@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", ["list", "generator"])
@pytest.mark.parametrize("second", ["200 OK", "500 Internal Server Error"])
def test_a_second_start_whose_error_is_swallowed_is_no_success(
    sqlite_database: Database,
    sqlite_registry: Registry,
    body: str,
    commit_on: CommitOn,
    second: str,
) -> None:
    """A debugger that shows an error page without exc_info swallows this error, too."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        flush_note(sqlite_registry, "a")
        start_response("200 OK", [])
        with contextlib.suppress(AssertionError):
            start_response(second, [])
        return [b"one"] if body == "list" else iter([b"one"])

    server = Server()
    wrapped = SessionMiddleware(app, sqlite_registry, commit_on=commit_on)

    with pytest.raises(AssertionError, match="a second time without exc_info"):
        server.run(wrapped, make_environ())

    # With "close" the first start has been passed on at once, and the body is cut at its end.
    assert [server.trace] == [["start 200", "block one"] if commit_on == "close" else []]
    assert sqlite_database.notes() == []
    assert_nothing_left(sqlite_registry)


# -- commit_error ---------------------------------------------------------------------------------


@pytest.mark.promise("commit_error", "no false success")
@pytest.mark.parametrize("status", ["200 OK", "303 See Other", "204 No Content", "100 Continue"])
@pytest.mark.parametrize("body", ["list body", "one block"])
def test_commit_error_cannot_answer_with_a_success(
    sqlite_registry: Registry, status: str, body: str
) -> None:
    """Its start is refused; the server gets an error, and the failure is its cause."""
    answer = BODIES["list body"](Program(status=status))
    program = Program(lambda: sqlite_registry.add(Book(author_id=7)))
    app = one_block(program, "3") if body == "one block" else BODIES[body](program)

    reply = ask(SessionMiddleware(app, sqlite_registry, commit_error=answer))

    assert reply.status == "500 Internal Server Error"
    (error,) = reply.errors
    assert f"commit_error must answer with status 4xx or 5xx, got {status!r}" in str(error)
    assert isinstance(error.__cause__, IntegrityError)


# -- a start_response that writes -----------------------------------------------------------------


def writing_start(app: WSGIApplication, work: Callable[[], object]) -> WSGIApplication:
    """Make the server, or a middleware: it works with the Session when the start comes."""

    def outer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(
            status: str, headers: Headers, exc_info: ExcInfo = None, /
        ) -> Callable[[bytes], object]:
            work()
            return start_response(status, headers, exc_info)

        return app(environ, start)

    return outer


@pytest.mark.promise("no silent loss", "cleanup")
@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("used", [True, False], ids=["used", "untouched"])
@pytest.mark.parametrize("body", BODIES)
def test_what_an_outer_start_writes_is_committed(
    sqlite_database: Database,
    sqlite_registry: Registry,
    body: str,
    used: bool,
    commit_on: CommitOn,
) -> None:
    """Such as a middleware that counts responses: nothing is lost, and nothing leaks."""
    program = Program(lambda: flush_note(sqlite_registry, "a") if used else None)
    app = SessionMiddleware(BODIES[body](program), sqlite_registry, commit_on=commit_on)
    outer = writing_start(app, lambda: flush_note(sqlite_registry, "start"))

    for _ in range(20):
        reply = ask(outer)
        assert (reply.status, reply.errors) == ("200 OK", [])
        assert_nothing_left(sqlite_registry)

    assert sqlite_database.notes() == ["a"] * 20 * used + ["start"] * 20


@pytest.mark.promise("no false success")
@pytest.mark.parametrize("used", [True, False], ids=["used", "untouched"])
@pytest.mark.parametrize(
    "body", ["list body", "tuple body", "file wrapper", "one block", "empty", "HEAD", "write"]
)
def test_an_outer_start_whose_write_fails_is_no_success(
    sqlite_registry: Registry, body: str, used: bool
) -> None:
    """Where the start comes with the end of the body, its work has an outcome before that."""
    scopes: list[Scope] = []

    def early() -> None:
        scopes.append(current_scope())
        if used:
            flush_note(sqlite_registry, "a")

    def empty(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        early()
        start_response("200 OK", [])
        yield from ()

    def write(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        early()
        start_response("200 OK", [("Content-Length", "3")])(b"one")
        return []

    program = Program(early)
    apps: dict[str, WSGIApplication] = {
        "one block": one_block(program, "3"),
        "empty": empty,
        "HEAD": BODIES["unsized generator"](program),
        "write": write,
    }
    app = apps.get(body) or BODIES[body](program)
    outer = writing_start(
        SessionMiddleware(app, sqlite_registry), lambda: sqlite_registry.add(Book(author_id=7))
    )
    server = Server()

    with pytest.raises(IntegrityError):
        server.run(outer, make_environ("HEAD" if body == "HEAD" else "GET"))

    assert server.written == []
    assert scopes[0].outcome == "rollback"
    assert_nothing_left(sqlite_registry)


@pytest.mark.promise("cleanup")
@pytest.mark.parametrize("body", ["list body", "unsized generator", "write()"])
def test_an_outer_start_that_raises_leaves_nothing(sqlite_registry: Registry, body: str) -> None:
    """Its error is that of the step."""

    def work() -> None:
        flush_note(sqlite_registry, "start")
        raise AppError

    app: Any = SessionMiddleware(BODIES[body](Program()), sqlite_registry)

    with pytest.raises(AppError):
        Server().run(writing_start(app, work), make_environ())

    assert_nothing_left(sqlite_registry)
