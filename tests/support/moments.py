"""The moments of the outcome, and what happens in them in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import event

from tests.support.models import Note

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.wsgi import Headers, Program, Server
    from wsgi_dbsession._moment import CommitOn

MOMENTS: list[CommitOn] = ["complete", "headers", "close"]


def html() -> Headers:
    """Return new headers: a server may change the list."""
    return [("Content-Type", "text/html")]


def trace_commits(registry: scoped_session[Session], server: Server) -> None:
    """Write commits and rollbacks between what the server is told."""
    factory = registry.session_factory
    event.listen(factory, "after_commit", lambda _: server.trace.append("commit"))
    event.listen(factory, "after_rollback", lambda _: server.trace.append("rollback"))


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


def one_block(program: Program, length: str | None = None) -> WSGIApplication:
    """Make an application with a body of one block, and code before and after it."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        program.early()
        headers = [("Content-Length", length)] if length is not None else []
        start_response(program.status, [*program.headers, *headers])
        yield b"one"
        program.last()

    return app


def flush_note(registry: scoped_session[Session], note: str) -> None:
    registry.add(Note(text=note))
    registry.flush()
