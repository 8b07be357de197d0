"""When: the moment of the outcome, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.errors import AppError
from tests.support.models import Database, Note
from tests.support.moments import MOMENTS, flush_note, moment_of, one_block, trace_commits
from tests.support.wsgi import BODIES, Program, Server, make_environ
from wsgi_dbsession import Scope, SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession._moment import CommitOn


@pytest.mark.promise("headers", "complete", "close")
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


@pytest.mark.promise("complete", "write", "no body")
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
            ["commit", "start 200", "block one", "commit", "end"],
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
            ["commit", "start 204", "block one", "commit", "end"],
            id="a status 204",
        ),
        pytest.param(
            "GET",
            "304 Not Modified",
            None,
            ["commit", "start 304", "block one", "commit", "end"],
            id="a status 304",
        ),
        pytest.param(
            "GET",
            "103 Early Hints",
            None,
            ["commit", "start 103", "block one", "commit", "end"],
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


@pytest.mark.promise("complete")
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


@pytest.mark.promise("no body")
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


@pytest.mark.promise("the rest")
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


@pytest.mark.promise("the rest", "incomplete")
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


@pytest.mark.promise("the rest")
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


@pytest.mark.promise("no connection held")
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
